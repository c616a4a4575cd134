"""`trtq quantize`: create a low-bit run from a checkpoint, or exchange the LoRAs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtq.commands.early import check_calls, check_folder, check_model, say_loading
from trtq.commands.options import (
    AsJson,
    Config,
    ImageSize,
    Inputs,
    Overwrite,
    Verbose,
    one_of,
    output_option,
    within,
)
from trtq.commands.output import command, print_lines, show
from trtq.errors import UsageError
from trtq.limits import MAX_ITERATIONS, MAX_SEED, MAX_STEPS
from trtq.progress import ProgressPrinter

if TYPE_CHECKING:
    pass

__all__ = ["quantize"]

METHODS = ("minmax", "search", "efficientdm", "quest", "combined", "best")

RunFolder = Annotated[Path, output_option("Folder for the run.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Diffusers folder, .safetensors file, hub id, or shipped model (digits, digits-dit, "
        "shapes); with --lora also a run.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        autocompletion=one_of(*METHODS),
        help="Quantisation method: minmax, search, efficientdm (default), quest, combined or best.",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        autocompletion=one_of("w4a4", "w4a8", "w8a8", "w4a16"),
        help="Bits of weights and activations: w4a4 (default), w4a8, w8a8 or another pair; w4a16 and "
        "w8a16 leave activations in float.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        autocompletion=one_of("int", "fp8", "nvfp4"),
        help="Format of low-bit layers: int (default), fp8 (RTX 40 and later) or nvfp4 (RTX 50).",
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        help="Input channels that share a scale with --bits w4a16 or w8a16: 32, 64, 128, or 0 for one "
        "scale per output channel. Default: 64 with 4 bits, 0 with 8.",
    ),
]
Calibrator = Annotated[
    str | None,
    typer.Option(
        "--calibrator",
        autocompletion=one_of("minmax", "search", "output", "entropy", "percentile", "mse"),
        help="How ranges of activations are found: minmax, search, output, entropy, percentile "
        "(99.99), percentile:99.9 or mse. Default: the method's.",
    ),
]
Tables = Annotated[
    str | None,
    typer.Option(
        "--tables",
        autocompletion=one_of("per-step", "static"),
        help="Activation scales: per-step (default), one per denoising step, or static.",
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        "--scales",
        autocompletion=one_of("step", "row", "hybrid", "auto"),
        help="Origin of activation scales: step (default), one per denoising step; row, one per row of "
        "the activation, computed while the model runs; hybrid, the smaller of both; auto, step or row "
        "for each linear layer.",
    ),
]
Smooth = Annotated[
    bool | None,
    typer.Option(
        "--smooth/--no-smooth",
        help="Scale the channels of a layer's input where this makes the layer's error smaller. "
        "Default: --smooth.",
        show_default=False,
    ),
]
Rotate = Annotated[
    int | None,
    typer.Option(
        "--rotate",
        metavar="0|16|64|256",
        help="Maximum number of input channels that a rotation mixes, where this makes the layer's "
        "error smaller. Default: 0, no rotation.",
    ),
]
RunSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        callback=within(1, MAX_STEPS),
        help="Number of denoising steps to calibrate. Default: 20.",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="TOML file with all settings; other options take precedence."),
]
RunSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        callback=within(0, MAX_SEED),
        help="Random seed; the same seed gives the same result.",
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(
        "--iterations",
        callback=within(1, MAX_ITERATIONS),
        help="Number of fine-tuning iterations.",
    ),
]
Blockwise = Annotated[
    bool,
    typer.Option(
        "--blockwise",
        help="Fine-tune one block of the denoiser at a time, in a fraction of the memory; --iterations "
        "counts the updates of each block.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Limit for mixed weight bits, chosen by sensitivity, relative to the float model: "
        "size=0.15x or bitops=0.1x.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="LoRA file to merge before quantisation, FILE[:SCALE]; may be repeated."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Float checkpoint of the run whose LoRAs are exchanged. Default: the recorded path.",
    ),
]
CallFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--call",
        metavar="FILE",
        help="TOML file with arguments of the pipeline's call, inside which the model is calibrated; "
        "may be repeated, one call each.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory to use, e.g. 24GB. Layers of a checkpoint whose float32 weights take over half of "
        "it read them from its files; fine-tuning needs --blockwise. Default: what is available.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and an estimate of the cost; write nothing."),
]


def quantize(
    model: Model,
    output: RunFolder,
    method: Method = None,
    bits: Bits = None,
    format: Format = None,
    group: Group = None,
    calibrator: Calibrator = None,
    tables: Tables = None,
    scales: Scales = None,
    smooth: Smooth = None,
    rotate: Rotate = None,
    steps: RunSteps = None,
    recipe: RecipeFile = None,
    seed: RunSeed = None,
    iterations: Iterations = None,
    blockwise: Blockwise = False,
    size: ImageSize = None,
    call: CallFiles = None,
    inputs: Inputs = None,
    budget: Budget = None,
    lora: Loras = None,
    base: Base = None,
    config: Config = None,
    memory: Memory = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Make a low-bit run of a checkpoint: calibrate, fine-tune without data, merge, pack.

    With a run in place of MODEL and --lora, the run's LoRAs are exchanged without fine-tuning again.

    Example: trtq quantize digits -o run --bits w4a4
    """
    from trtq.artefact.opened import Run, open_artefact
    from trtq.calib.recipe import load_recipe
    from trtq.lora import parse_lora
    from trtq.report.lines import plan_rows, quantize_rows
    from trtq.runs.result import RunResult

    with command(verbose):
        overrides = _without_none(
            {"method": method, "bits": bits, "format": format, "group": group}
            | {"tables": tables, "scales": scales, "smooth": smooth, "rotate": rotate}
            | {"steps": steps}
            | {"seed": seed, "budget": budget, "size": size}
        )
        if calibrator is not None:
            overrides["calibration"] = {"activations": calibrator}
        if blockwise:
            overrides["blockwise"] = {}
        loras = [parse_lora(text) for text in lora or []]
        opened = open_artefact(model, verify=False, config=config)
        exchanges = bool(loras) and isinstance(opened, Run)
        if iterations is not None and not exchanges:
            overrides["training"] = {"iterations": iterations}
        settings = load_recipe(recipe, {} if exchanges else overrides)
        check_calls(call or [])
        if not exchanges and not dry_run:
            check_folder(output, model, "run", overwrite=overwrite)
        check_model(model, config)
        say_loading()
        from trtq.calls.files import read_call, read_inputs
        from trtq.runs.quantize import quantize as make_run

        calls = [read_call(path).arguments for path in call or []]
        files = read_inputs(inputs or [])
        outcome: dict[str, Any] = {"overwrite": overwrite, "progress": ProgressPrinter()}
        result: RunResult | None
        if loras and isinstance(opened, Run):
            if overrides or recipe or iterations or resume or dry_run or calls or files:
                raise UsageError(
                    "a run whose LoRAs are exchanged keeps its recipe; give only --lora, --base, "
                    "--overwrite and --output"
                )
            from trtq.runs.exchange_loras import requantize

            result = requantize(opened, loras, output, base=base, **outcome)
        else:
            if dry_run:
                from trtq.runs.describe import describe_quantize

                plan = describe_quantize(opened, settings, loras, calls or None, files, memory)
                show(plan, as_json, lambda r: print_lines("would quantize", plan_rows(r)))
                return
            result = make_run(
                opened,
                settings,
                output,
                loras=loras,
                calls=calls or None,
                inputs=files,
                memory=memory,
                resume=resume,
                **outcome,
            )
        if result is not None:  # None in all processes of accelerate except the first.
            show(result, as_json, lambda r: print_lines(f"run: {output}", quantize_rows(r)))


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
