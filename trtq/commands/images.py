"""`trtq generate` and `trtq eval`: generate images, and compare them with the float model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trtq.commands.early import check_calls, check_model, say_loading
from trtq.commands.options import (
    AsJson,
    CallFile,
    Guidance,
    ImageSize,
    Inputs,
    Overwrite,
    Provider,
    ReportFolder,
    Seed,
    Steps,
    Verbose,
    output_option,
    within,
)
from trtq.commands.output import command, print_line, print_lines, show
from trtq.errors import GateError, UsageError
from trtq.limits import MAX_IMAGES
from trtq.progress import ProgressPrinter

__all__ = ["evaluate", "generate"]

ImagePath = Annotated[
    Path | None,
    output_option(
        "Contact sheet (NAME.png), video (NAME.gif, NAME.mp4), sound (NAME.wav), or folder for one "
        "file per result."
    ),
]
ShowCall = Annotated[
    bool,
    typer.Option("--show-call", help="Print what the pipeline's call takes; generate nothing."),
]
Artefact = Annotated[
    str,
    typer.Argument(metavar="ARTEFACT", help="Run, ONNX folder, engine folder or checkpoint."),
]
Images = Annotated[
    int,
    typer.Option("--images", callback=within(1, MAX_IMAGES), help="Number of images to generate."),
]
ClassLabel = Annotated[
    int | None,
    typer.Option(
        "--class-label",
        help="Class index, for class-conditional models. Default: all classes in turn.",
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", help="Prompt, for text-to-image models.")]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt", help="Description of what to avoid; needs a guidance above 1."
    ),
]
Reference = Annotated[
    str, typer.Option("--reference", help="Float checkpoint to compare with, e.g. digits.")
]
EvaluationImages = Annotated[
    int | None,
    typer.Option(
        "--images",
        callback=within(2, MAX_IMAGES),
        help="Number of images to generate per model. Default: 1000, or 8 calls of a pipeline that was "
        "recorded.",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        "--features",
        help="Folder of a CLIP vision model that replaces the reference's own classifier.",
    ),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        help='Condition METRIC<=NUMBER, e.g. "fd<=1.5"; exit code 1 if not met; may be repeated.',
    ),
]


def generate(
    artefact: Artefact,
    output: ImagePath = None,
    images: Images = 1,
    class_label: ClassLabel = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    size: ImageSize = None,
    steps: Steps = None,
    guidance: Guidance = None,
    call: CallFile = None,
    inputs: Inputs = None,
    show_call: ShowCall = False,
    provider: Provider = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Generate images: one contact sheet (-o NAME.png), or one PNG per image (-o FOLDER).

    Other pipelines give a video (-o NAME.gif) or a sound (-o NAME.wav), or take a picture.

    Example: trtq generate onnx -o cat.png --input image=cat.png --prompt "a cat in the snow"
    """
    with command(verbose):
        check_calls([] if call is None else [call])
        check_model(artefact)
        if output is None and not show_call:
            raise UsageError("missing option -o / --output: name a file or a folder")
        say_loading()
        from trtq.calls.files import read_inputs
        from trtq.pipelines.generate import generate as generate_images
        from trtq.report.lines import generate_rows

        if show_call:
            from trtq.pipelines.called import show_call as describe

            show(describe(artefact), as_json, lambda r: _print_call(artefact, r))
            return
        assert output is not None
        result = generate_images(
            artefact,
            output,
            images=images,
            class_label=class_label,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=size,
            steps=steps,
            guidance=guidance,
            seed=seed,
            call=call,
            inputs=read_inputs(inputs or []),
            provider=provider,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        show(result, as_json, lambda r: print_lines("generated", generate_rows(r)))


def _print_call(artefact: str, record: dict[str, Any]) -> None:
    recorded = ", with the values of the recorded call" if record["recorded"] else ""
    print_line(f"{artefact}: the call of {record['pipeline']}{recorded}")
    for row in record["arguments"]:
        default = "required" if row["required"] else f"default {row['default']}"
        print_line(f"\n{row['name']}: {row['type'] or 'any type'}, {default}")
        if row["value"] is not None:
            print_line(f"    recorded: {row['value']}", fold=True)
        if row["text"]:
            print_line(f"    {row['text']}", fold=True)


def evaluate(
    artefact: Artefact,
    reference: Reference,
    output: ReportFolder = None,
    images: EvaluationImages = None,
    steps: Steps = None,
    guidance: Guidance = None,
    call: CallFile = None,
    inputs: Inputs = None,
    provider: Provider = None,
    features: Features = None,
    gate: Gates = None,
    seed: Seed = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare with the float model: Fréchet distance, class accuracy, error per denoising step.

    Example: trtq eval onnx --reference digits -o report --gate "fd<=2"
    """
    from trtq.report.folder import report_folder, write_report

    with command(verbose), report_folder(output, kind="eval", overwrite=overwrite):
        check_calls([] if call is None else [call])
        check_model(artefact)
        check_model(reference)
        say_loading()
        from trtq.calls.files import read_inputs
        from trtq.evaluation.evaluate import Evaluation
        from trtq.evaluation.evaluate import evaluate as compare
        from trtq.evaluation.gates import parse_gate

        evaluation = compare(
            artefact,
            reference,
            images=images,
            steps=steps,
            seed=seed,
            guidance=guidance,
            call=call,
            inputs=read_inputs(inputs or []),
            provider=provider,
            features=features,
            gates=tuple(parse_gate(text) for text in gate or []),
            progress=ProgressPrinter(),
        )
        record = evaluation.to_json()
        # Printed before the report is written: a full disk must not cost a long measurement.
        place = {} if output is None else {"report": str(output / "index.html")}
        known = isinstance(evaluation, Evaluation)
        human = _print_evaluation if known else _print_calls
        show(record | place, as_json, lambda r: human(artefact, r))
        if output is not None:
            from trtq.evaluation.page import called_page, evaluation_page

            page = (
                evaluation_page(artefact, evaluation)
                if isinstance(evaluation, Evaluation)
                else called_page(artefact, evaluation)
            )
            write_report(output, page, record, kind="eval", overwrite=overwrite)
        missed = [name for name, met in record["gates"].items() if not met]
        if missed:
            raise GateError(f"not met: {', '.join(missed)}")


def _print_evaluation(artefact: str, record: dict[str, Any]) -> None:
    from trtq.report.lines import evaluation_rows

    title = (
        f"eval: {artefact}, {record['images']} images, {record['steps']} steps, "
        f"guidance {record['guidance']:g}, seed {record['seed']}, provider "
        f"{record['provider']}, features: {record['features'] or 'none'}"
    )
    header = ("metric (95 % interval)", "this model", "float")
    print_lines(title, evaluation_rows(record), header)
    snr = ", ".join(f"{value:.1f}" for value in reversed(record["snr_db"]))
    print_line(f"prediction SNR per step, noisiest first, dB: {snr}")
    if record.get("not_computed"):
        print_line(
            f"not computed: {', '.join(record['not_computed'])}: the reference model has no "
            "classifier; pass --features FOLDER with a CLIP vision model"
        )
    _print_end(record)


def _print_calls(artefact: str, record: dict[str, Any]) -> None:
    from trtq.report.lines import evaluation_rows

    what = {"video": "videos", "audio": "sounds"}.get(record["media"], "images")
    steps = "" if record["steps"] is None else f", {record['steps']} steps"
    title = (
        f"eval: {artefact}, {record['images']} {what}, {record['frames']} compared{steps}, seed "
        f"{record['seed']}, provider {record['provider']}"
    )
    print_lines(title, evaluation_rows(record), ("metric (95 % interval)", "this model", "float"))
    _print_end(record)


def _print_end(record: dict[str, Any]) -> None:
    from trtq.report.lines import seconds_text

    for condition, met in record["gates"].items():
        print_line(f"gate {condition}: {'met' if met else 'NOT met'}")
    for name, key in (("this model", "seconds"), ("float", "seconds_reference")):
        print_line(f"generation with {name}: {seconds_text(record[key])}")
