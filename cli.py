"""The command line: each verb parses, calls one library function and prints."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import trtq
from trtq.artefact.partial import RESUMABLE
from trtq.documents import shown
from trtq.errors import ArtefactError, GateError, TrtqError, UsageError
from trtq.limits import (
    MAX_BATCH,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_ITERATIONS,
    MAX_STEPS,
    MAX_THREADS,
)
from trtq.processes import StoppedBySignal, ending_on_signals
from trtq.progress import ProgressPrinter
from trtq.report import lines
from trtq.terminal import (
    StderrHandler,
    internal_error,
    one_line,
    open_streams,
    sane_environment,
    stop_writing,
)


class _Remembering(typer.core.TyperGroup):
    """Keeps what the user typed, for messages that repeat it."""

    typed: Sequence[str] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the arguments down."""
        type(self).typed = tuple(args)
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    """What the command `trtq` runs: no error reaches the user as a traceback, wherever it comes from."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, run, exit."""
        open_streams()
        try:
            Path.cwd()
        except OSError as err:
            _print_error(
                f"error: the current folder cannot be used ({err.strerror}); change to another"
            )
            raise SystemExit(UsageError.exit_code) from err
        try:
            return super().__call__(*args, **kwargs)
        except BrokenPipeError:
            stop_writing()
            raise SystemExit(_BROKEN_PIPE) from None
        except Exception as err:
            # Before or after a verb's own work: imports, and what typer makes of arguments.
            verbose = any(argument in ("-v", "--verbose") for argument in sys.argv[1:])
            raise SystemExit(internal_error(err, _print_error, verbose=verbose)) from err


app = _App(
    cls=_Remembering,
    name="trtq",
    help="Low-bit diffusion models: from a diffusers checkpoint to images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _plainly(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def _within(least: float, most: float) -> Callable[[Any], Any]:
    """A check of a number; not-a-number, which passes every comparison with one bound, is none."""

    def check(value: Any) -> Any:
        if value is not None and not least <= value <= most:
            number = f"{value:g}" if isinstance(value, float) else shown(value)
            raise typer.BadParameter(
                f"{number} is out of range; choose {_plainly(least)} .. {_plainly(most)}."
            )
        return value

    return check


Output = Annotated[Path, typer.Option("-o", "--output", help="Where the result goes.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout; everything else on stderr.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, on stderr.")]
Seed = Annotated[
    int, typer.Option("--seed", callback=_within(0, 2**31 - 1), help="Same seed, same result.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider", help="What runs it: torch, cpu, openvino, cuda, tensorrt-rtx, tensorrt."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        callback=_within(0, MAX_GUIDANCE),
        help="Up to 1 is none; by default as calibrated.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", help="Max seconds for opening and calling one graph.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", callback=_within(1, MAX_STEPS), help="Denoising steps.")
]

_BROKEN_PIPE = 141
"""What a shell gives for a program that SIGPIPE ended."""
_DAY = 86_400.0
_NAME_WIDTH = 28


# What is printed holds names that users gave: brackets and colons in them are no markup and no emoji.
class _Console(Console):
    """A console that leaves a pipe without a reader to the command."""

    def on_broken_pipe(self) -> None:
        """Raise what print raises."""
        raise BrokenPipeError


_plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_err = _Console(stderr=True, _environ=sane_environment(), **_plain)
_out = _Console(_environ=sane_environment(), **_plain)


def _print_error(text: str) -> None:
    # One line, whatever names of the user's are in it; a terminal obeys no name.
    _err.print(one_line(text), style="red", soft_wrap=True)


@contextmanager
def _command(verbose: bool) -> Iterator[None]:
    """Errors of the caller become one line and an exit code; -v adds the traceback."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        handlers=[StderrHandler()],
        force=True,
    )
    if not verbose:
        # Its remarks about image processors that no pipeline here uses; read when it is imported.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for noisy in ("matplotlib", "PIL", "asyncio", "onnx_ir", "onnxscript", "torch", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with ending_on_signals():
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
    except TrtqError as err:
        if verbose:
            _err.print_exception()
        _print_error(f"error: {err}")
        raise typer.Exit(err.exit_code) from err
    except BrokenPipeError as err:
        # Who read what is printed has seen enough.
        stop_writing()
        raise typer.Exit(_BROKEN_PIPE) from err
    except OSError as err:
        if verbose:
            _err.print_exception()
        _print_error(f"error: {err}")
        raise typer.Exit(1) from err
    except KeyboardInterrupt as err:
        _say_ended("interrupted", err)
        raise typer.Exit(130) from err
    except StoppedBySignal as err:
        _say_ended(f"stopped by {err.name}", err)
        raise typer.Exit(int(err.code or 1)) from err
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as err:
        raise typer.Exit(internal_error(err, _print_error, verbose=verbose)) from err


def _say_ended(what: str, err: BaseException) -> None:
    """One line, with the command that goes on where there is a checkpoint to go on from."""
    arguments = list(_Remembering.typed)
    if RESUMABLE in getattr(err, "__notes__", ()) and "quantize" in arguments[:1]:
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        what += f"; its checkpoints are kept, go on with: {shlex.join(['trtq', *again])}"
    # After SIGHUP the terminal is gone.
    with suppress(OSError):
        _err.print(what, soft_wrap=True)


def _show(result: dict[str, Any], as_json: bool, human: Callable[[dict[str, Any]], None]) -> None:
    try:
        if as_json:
            # NaN and infinity are no JSON.
            print(json.dumps(_finite(result)))  # noqa: T201
        else:
            human(result)
        # A full disk shows here, and not when everything is over.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        stop_writing()
        raise ArtefactError(f"cannot write the result to standard output: {err.strerror}") from err


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _lines(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A result for people: a title, and a row of texts per line; long texts are folded, not cut."""
    table = Table(title=title, show_header=bool(header), title_justify="left", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge = False, False
    for index in range(max(len(row) for row in rows) if rows else 0):
        name = header[index] if header else ""
        table.add_column(name, overflow="fold", no_wrap=False)
    for row in rows:
        table.add_row(*row)
    _out.print(table)


def _layers(rows: Sequence[dict[str, Any]]) -> None:
    """Layers with their whole names: one line each where the terminal is wide enough, else two."""
    from trtq.evaluation.page import scale_range
    from trtq.quant import precision_text

    reasons = list(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
    notes = {reason: f"[{number}]" for number, reason in enumerate(reasons, 1)}
    cells = []
    for row in rows:
        bits = (row.get(f"{what}_bits") for what in ("weight", "activation", "right"))
        shape = "x".join(str(side) for side in row["shape"]) if "shape" in row else ""
        points = ", ".join(str(z) for z in row.get("zero_points", []))
        cells.append(
            (
                row["name"],
                row.get("kind", ""),
                precision_text(*bits) if "kind" in row else "float",
                scale_range(row) or shape,
                f"zero {points}" if points else "",
                notes.get(row.get("reason", ""), ""),
            )
        )
    _out.print(f"\n{len(rows)} layers: kind, bits, scale over the steps, zero points, why")
    widths = [max((len(texts[i]) for texts in cells), default=0) for i in range(6)]
    narrow = sum(widths) + 10 > _out.width
    for texts in cells:
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        if narrow:
            _out.print(texts[0], soft_wrap=True)
            _out.print(("    " + "  ".join(padded[1:])).rstrip(), soft_wrap=True)
        else:
            _out.print("  ".join(padded).rstrip(), soft_wrap=True)
    for reason, note in notes.items():
        _out.print(f"{note} {reason}", soft_wrap=True)


def _folding(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that drops nothing in a narrow terminal: cells take more lines, names last of all."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    longest = max((len(row[0]) for row in rows), default=0)
    table.add_column(header[0], overflow="fold", min_width=min(longest, _NAME_WIDTH))
    for name in header[1:]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _version(wanted: bool) -> None:
    if wanted:
        _out.print(trtq.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-bit diffusion models: from a diffusers checkpoint to images."""


@app.command()
def doctor(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Say what is installed and what can run here.

    Example: trtq doctor
    """
    from trtq.engine.doctor import doctor as look

    with _command(verbose):
        result = look().to_json()

        def human(found: dict[str, Any]) -> None:
            _lines("trtq doctor", lines.doctor_rows(found))
            for problem in found["problems"]:
                _out.print(f"! {problem}")
            for hint in found["hints"]:
                _out.print(f"- {hint}")
            if found["ok"]:
                _out.print("all well")

        _show(result, as_json, human)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="A diffusers folder, a hub id, digits or shapes; or a run, with --lora."
        ),
    ],
    output: Output,
    method: Annotated[
        str | None,
        typer.Option("--method", help="minmax, search, efficientdm (default), quest, combined."),
    ] = None,
    bits: Annotated[str | None, typer.Option("--bits", help="E.g. w4a4, w4a8, w8a8.")] = None,
    tables: Annotated[
        str | None, typer.Option("--tables", help="per-step (default) or static.")
    ] = None,
    steps: Steps = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A TOML file.")] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", callback=_within(0, 2**31 - 1), help="Same seed, same result."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations", callback=_within(1, MAX_ITERATIONS), help="Fine-tuning iterations."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="HEIGHTxWIDTH of the images in pixels.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Weight bits by sensitivity: size=0.15x or bitops=0.1x."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="FILE[:SCALE], merged before quantising; may be repeated."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Float checkpoint of a run whose LoRAs change, if it moved."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run's checkpoint.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
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
    from trtq.runs.describe import describe_plan
    from trtq.runs.exchange_loras import requantize
    from trtq.runs.plan import plan_quantize
    from trtq.runs.quantize import quantize as run_stage

    with _command(verbose):
        given: dict[str, Any] = {
            "method": method,
            "bits": bits,
            "tables": tables,
            "steps": steps,
            "seed": seed,
            "budget": budget,
            "size": size,
        }
        overrides = {key: value for key, value in given.items() if value is not None}
        loras = [parse_lora(text) for text in lora or []]
        if loras and isinstance(open_artefact(model, verify=False), Run):
            if overrides or recipe or iterations or resume or dry_run:
                raise UsageError(
                    "a run whose LoRAs are exchanged keeps its recipe; give only --lora, --base, "
                    "--overwrite and --output"
                )
            exchanged = requantize(
                model, loras, output, base=base, overwrite=overwrite, progress=ProgressPrinter()
            )
            result = exchanged.to_json()
            _show(result, as_json, lambda r: _lines(f"run: {output}", lines.quantize_rows(r)))
            return
        if iterations is not None:
            overrides["training"] = {"iterations": iterations}
        chosen = load_recipe(recipe, overrides)
        if dry_run:
            plan = plan_quantize(model, chosen, loras)
            result = describe_plan(plan).to_json()
            _show(result, as_json, lambda r: _lines("would quantize", lines.plan_rows(r)))
            return
        run = run_stage(
            model,
            chosen,
            output,
            loras=loras,
            resume=resume,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        if run is not None:  # None in all processes of accelerate except the first.
            result = run.to_json()
            _show(result, as_json, lambda r: _lines(f"run: {output}", lines.quantize_rows(r)))


@app.command()
def export(
    path: Annotated[str, typer.Argument(help="A run, or a checkpoint for the float baseline.")],
    output: Output,
    target: Annotated[
        str, typer.Option("--target", help="qdq, or plugin: our own kernels, in TensorRT.")
    ] = "qdq",
    precision: Annotated[str, typer.Option("--precision", help="fp32 or fp16.")] = "fp32",
    batch: Annotated[
        str, typer.Option("--batch", help="MIN:MAX batch that engines are to take.")
    ] = "1:8",
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH of the images in pixels, or SMALLEST:LARGEST."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write ONNX that carries the per-step scales, and check it against torch at every step.

    Example: trtq export run -o onnx
    """
    from trtq.exporter.export import export as run_stage
    from trtq.exporter.export import parse_batch

    with _command(verbose):
        result = run_stage(
            path,
            output,
            target=target,
            precision=precision,
            batch=parse_batch(batch),
            size=size,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )

        _show(result.to_json(), as_json, lambda r: _lines(f"onnx: {output}", lines.export_rows(r)))


@app.command()
def build(
    path: Annotated[str, typer.Argument(help="An ONNX folder.")],
    output: Output,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="tensorrt-rtx or tensorrt; by default what is installed."),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="E.g. sm86; may be repeated. Default: sm86, sm89 and sm120."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="MIN:MAX images; by default what was exported for."),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay on the host.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Weights can be exchanged; needs a GPU.")
    ] = False,
    workspace: Annotated[
        int | None,
        typer.Option(
            "--workspace", callback=_within(1, 1 << 20), help="Most MiB of scratch on the device."
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Use engines that were built before.")
    ] = True,
    timeout: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Build TensorRT engines of an ONNX folder; TensorRT-RTX needs no GPU for it.

    Example: trtq build onnx -o engine --arch sm86 --arch sm89
    """
    from trtq.exporter.build import build as run_stage
    from trtq.exporter.export import parse_batch

    with _command(verbose):
        result = run_stage(
            path,
            output,
            backend=backend,
            architectures=arch or [],
            batch=None if batch is None else parse_batch(batch),
            weight_streaming=weight_streaming,
            refit=refit,
            workspace_bytes=None if workspace is None else workspace << 20,
            use_cache=cache,
            timeout=timeout,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )

        def human(found: dict[str, Any]) -> None:
            header = ("engine", "size", "layers", "in float", "built in", "from the cache")
            rows = [
                (
                    str(row["name"]),
                    lines.bytes_text(row["engine_bytes"]),
                    "-" if row["layers"] is None else str(row["layers"]),
                    "-" if row["float"] is None else str(row["float"]),
                    lines.seconds_text(row["build_seconds"]),
                    "yes" if row["cached"] else "no",
                )
                for row in found["engines"]
            ]
            _lines(f"engine: {output}", rows, header)

        _show(result.to_json(), as_json, human)


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A run, an ONNX folder or a checkpoint.")],
    output: Output,
    images: Annotated[
        int, typer.Option("--images", callback=_within(1, MAX_IMAGES), help="How many.")
    ] = 1,
    class_label: Annotated[
        int | None,
        typer.Option("--class-label", help="One class; by default all in turn."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="For text models.")] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative-prompt", help="What not to show; needs guidance above 1."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="HEIGHTxWIDTH of the images in pixels.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    provider: Provider = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Generate images: on one sheet (-o NAME.png), or a PNG each (-o FOLDER).

    Example: trtq generate onnx -o digits.png --images 20 --provider openvino
    """
    from trtq.pipelines.generate import generate as run_stage

    with _command(verbose):
        result = run_stage(
            path,
            output,
            images=images,
            class_label=class_label,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=size,
            steps=steps,
            guidance=guidance,
            seed=seed,
            provider=provider,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        _show(result.to_json(), as_json, lambda r: _lines("generated", lines.generate_rows(r)))


@app.command(name="eval")
def evaluate(
    path: Annotated[str, typer.Argument(help="A run, an ONNX folder or a checkpoint.")],
    reference: Annotated[str, typer.Option("--reference", help="The float model.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the report.")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", callback=_within(2, MAX_IMAGES), help="Drawn with each.")
    ] = 1000,
    steps: Steps = None,
    guidance: Guidance = None,
    provider: Provider = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="A CLIP vision model's folder to judge by instead."),
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", help='E.g. "fd<=1.5"; exit 1 if not met.')
    ] = None,
    seed: Seed = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare with the float model: Fréchet distance, class accuracy, error of every step.

    Example: trtq eval onnx --reference digits -o report --gate "fd<=2"
    """
    from trtq.evaluation.evaluate import evaluate as run_stage
    from trtq.evaluation.evaluate import parse_gate
    from trtq.report.folder import report_folder, write_report

    with _command(verbose), report_folder(output, kind="eval", overwrite=overwrite):
        gates = tuple(parse_gate(text) for text in gate or [])
        evaluation = run_stage(
            path,
            reference,
            images=images,
            steps=steps,
            seed=seed,
            guidance=guidance,
            provider=provider,
            features=features,
            gates=gates,
            progress=ProgressPrinter(),
        )
        result = evaluation.to_json()

        def human(found: dict[str, Any]) -> None:
            features = found["features"] or "none"
            title = (
                f"eval: {path}, {found['images']} images, {found['steps']} steps, "
                f"guidance {found['guidance']:g}, seed {found['seed']}, provider "
                f"{found['provider']}, features: {features}"
            )
            header = ("metric (95 % interval)", "this model", "float")
            _lines(title, lines.evaluation_rows(found), header)
            steps = ", ".join(f"{value:.1f}" for value in reversed(found["snr_db"]))
            _out.print(f"prediction SNR per step, noisiest first, dB: {steps}", soft_wrap=True)
            if found.get("not_computed"):
                _out.print(
                    f"not computed: {', '.join(found['not_computed'])}: the reference model has no "
                    "classifier; pass --features FOLDER with a CLIP vision model",
                    soft_wrap=True,
                )
            for condition, held in found["gates"].items():
                _out.print(f"gate {condition}: {'met' if held else 'NOT met'}", soft_wrap=True)
            for part, seconds in (("this model", "seconds"), ("float", "seconds_reference")):
                _out.print(f"drawing with {part}: {lines.seconds_text(found[seconds])}")

        # Before the report: a full disk must not cost what took so long to measure.
        place = {} if output is None else {"report": str(output / "index.html")}
        _show(result | place, as_json, human)
        if output is not None:
            from trtq.evaluation.page import evaluation_page

            page = evaluation_page(path, evaluation)
            write_report(output, page, result, kind="eval", overwrite=overwrite)
        missed = [name for name, held in result["gates"].items() if not held]
        if missed:
            raise GateError(f"not met: {', '.join(missed)}")


class _ArtefactsUnlessNamed(typer.core.TyperGroup):
    """`trtq bench PATH…` measures artefacts, and `trtq bench WORD …` is what that word stands for."""

    artefacts = "artefacts"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front that needs not be named."""
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else [self.artefacts, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, under the name that the user typed: none."""
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == self.artefacts else name), command, rest


bench_app = typer.Typer(
    cls=_ArtefactsUnlessNamed, add_help_option=False, rich_markup_mode=None, add_completion=False
)
app.add_typer(
    bench_app, name="bench", help="Measure artefacts side by side, the float model among them."
)


@bench_app.command(_ArtefactsUnlessNamed.artefacts, hidden=True)
def bench(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Artefacts and checkpoints; PATH@PROVIDER for one provider of its own. The float "
            "checkpoint is added if there is none."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the report.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", help="Of paths without @: cpu, openvino, cuda, torch; may be repeated."
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Images at once, e.g. 1 or 1,4,16.")
    ] = "1,4",
    images: Annotated[
        int,
        typer.Option(
            "--images", callback=_within(1, MAX_IMAGES), help="Drawn with each row, at the least."
        ),
    ] = 8,
    turns: Annotated[
        int | None,
        typer.Option(
            "--turns",
            callback=_within(2, 10_000),
            help="Of half a second of calls each, row after row; 10, or more if "
            "a verdict needs more.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            callback=_within(1, MAX_THREADS),
            help="Of every row; by default all cores.",
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A former result (JSON) to compare with.")
    ] = None,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit 1 if low-bit is slower than float, or not compared."),
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure artefacts side by side: speed, memory, and what the device could do.

    The rows take turns, each in a process of its own, so one is as undisturbed as the other.

    Example: trtq bench onnx@openvino onnx@cpu float_onnx@openvino --batch 1,4 -o report
    """
    from trtq.bench.artefacts import parse_batches
    from trtq.bench.page import bench_page, bench_tables, failures, statements
    from trtq.bench.run import benchmark as run_stage
    from trtq.report.folder import report_folder, write_report

    with _command(verbose), report_folder(output, kind="bench", overwrite=overwrite):
        sizes = parse_batches(batch)
        measured = run_stage(
            paths,
            providers=provider or [],
            batches=sizes,
            turns=turns,
            images=images,
            steps=steps,
            guidance=guidance,
            threads=threads,
            seed=seed,
            against=against,
            judge=gate,
            progress=ProgressPrinter(),
        )
        result = measured.to_json()

        def human(found: dict[str, Any]) -> None:
            for title, shown in bench_tables(found).items():
                _out.print(_folding(title, shown.header, shown.rows))
                _out.print()
            for line in statements(found):
                _out.print(line, soft_wrap=True)

        # Before the report: a full disk must not cost what took so long to measure.
        place = {} if output is None else {"report": str(output / "index.html")}
        _show(result | place, as_json, human)
        if output is not None:
            write_report(output, bench_page(result), result, kind="bench", overwrite=overwrite)
        failed = failures(result)
        if gate and failed:
            raise GateError("; ".join(failed))


@bench_app.command("kernels")
def bench_layers(
    forms: Annotated[
        list[str] | None, typer.Option("--form", help="w8a8, w4a8 or w4a4; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file for the result.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure our CUDA kernels against cuBLAS and cuDNN in half precision, layer by layer.

    Needs an NVIDIA GPU. Each layer is first compared with its definition, integer by integer; exit 1 if
    one is wrong or fails, after all are measured.

    Example: trtq bench kernels -o kernels.json
    """
    from trtq.artefact.outputs import check_file, new_file
    from trtq.bench.kernels import FORMS, bench_kernels, failed_rows

    with _command(verbose):
        if output is not None:
            check_file(output, overwrite=overwrite)
        result = bench_kernels(forms or list(FORMS), progress=ProgressPrinter())

        def human(found: dict[str, Any]) -> None:
            table = Table(title=str(found["gpu"]), title_justify="left")
            times = ("us", "quantise", "product", "fp16 us", "times", "TOP/s", "of peak")
            for key in ("model", "shape", "form", *times):
                table.add_column(key)
            for row in found["rows"]:
                where = (row["model"], row["shape"], row["form"])
                if row["error"] is not None:
                    table.add_row(*where, "failed")
                    continue
                share = row["share_of_peak"]
                table.add_row(
                    *where,
                    f"{row['microseconds']:.1f}" + ("!" if row["wrong_values"] else ""),
                    f"{row['quantise_microseconds']:.1f}",
                    f"{row['product_microseconds']:.1f}",
                    f"{row['fp16_microseconds']:.1f}",
                    f"{row['speedup']:.2f}",
                    f"{row['tera_operations']:.0f}",
                    "?" if share is None else f"{share:.0%}",
                )
            _out.print(table)

        # Printed first: a full disk must not cost what took so long to measure.
        _show(result, as_json, human)
        if output is not None:
            with new_file(output, overwrite=overwrite) as partial:
                partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        failed = failed_rows(result)
        if failed:
            for text in failed[1:]:
                _print_error(f"error: {text}")
            raise GateError(failed[0])


plugins_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
app.add_typer(plugins_app, name="plugins", help="Our CUDA kernels.")


@plugins_app.command("build")
def build_plugins(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", help="E.g. sm89; may be repeated. All by default.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compile all kernels ahead of their first use; needs neither a GPU nor nvcc.

    Example: trtq plugins build --arch sm89
    """
    from trtq.plugins.compile import build_all
    from trtq.plugins.spec import ARCHITECTURES

    with _command(verbose):
        found = build_all(tuple(arch or ARCHITECTURES), ProgressPrinter())
        counts = [(name, f"{len(variants)} kernels") for name, variants in found.items()]
        _show(found, as_json, lambda _: _lines("kernels", counts))


package_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
app.add_typer(package_app, name="package", help="Hand an artefact over to another server.")


@package_app.command()
def triton(
    path: Annotated[str, typer.Argument(help="An ONNX folder, or an engine folder.")],
    output: Output,
    onnx: Annotated[
        Path | None,
        typer.Option("--onnx", help="The ONNX folder that engines were built from, if it moved."),
    ] = None,
    timeout: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a Triton Inference Server model repository: each graph a model, and the pipeline one.

    Example: trtq package triton onnx -o model_repository
    """
    from trtq.serve.triton.package import package_triton

    with _command(verbose):
        result = package_triton(
            path,
            output,
            onnx=onnx,
            timeout=timeout,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )

        def human(found: dict[str, Any]) -> None:
            table = Table(title=f"model repository: {output}", title_justify="left")
            keys = ("backend", "max_batch_size")
            for key in ("model", *keys, "files"):
                table.add_column(key)
            for name, row in found["models"].items():
                table.add_row(name, *(str(row[key]) for key in keys), str(len(row["files"])))
            _out.print(table)
            for note in found["notes"]:
                _out.print(f"note: {note}", soft_wrap=True)

        _show(result.to_json(), as_json, human)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A run, an ONNX or engine folder, a checkpoint.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show layers, bits and tables; verifies the artefact first.

    Example: trtq inspect run
    """
    from trtq.pipelines.inspect import inspect as look

    with _command(verbose):

        def human(found: dict[str, Any]) -> None:
            _lines(str(path), lines.inspect_rows(found))
            _layers(found["layers"])
            for row in found.get("engine_layers") or []:
                _out.print(str(row.get("Name")), soft_wrap=True)

        _show(look(path).to_json(), as_json, human)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A run or an ONNX folder.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", help="The run it was exported from: compare with torch."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime", help="onnxruntime, openvino, tensorrt-rtx or tensorrt; by default all."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare the output of every low-bit layer.")
    ] = False,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check files, open and call the graphs, check rules and numbers; exit 1 if something is wrong.

    Example: trtq verify onnx --against run --layers
    """
    from trtq.exporter.verify import verify as check
    from trtq.graph.runtimes.prepare import RUNTIMES

    with _command(verbose):
        result = check(
            path,
            against=against,
            runtimes=runtime or RUNTIMES,
            layers=layers,
            timeout=timeout,
            progress=ProgressPrinter(),
        )
        _show(result.to_json(), as_json, lambda found: _show_verified(path, found))
    if not result.ok:
        raise typer.Exit(1)


def _show_verified(path: str, found: dict[str, Any]) -> None:
    rows: dict[str, str] = {
        "kind": found["kind"],
        "files as in the manifest": str(found["files"]),
    }
    for name, problem in found.get("graphs", {}).items():
        rows[f"{name}, opened and called"] = "yes" if problem is None else "FAILED"
    for name, runtime in found.get("runtimes", {}).items():
        notes = sum(not finding["fatal"] for finding in runtime["findings"])
        rows[name] = ("legal" if runtime["legal"] else "refused") + (
            f", {notes} layers in float" if notes else ""
        )
    if "parity_db_min" in found:
        rows["least parity"] = (
            f"{found['parity_db_min']:.1f} dB (required {found['parity_required_db']:g})"
        )
    _lines(path, list(rows.items()))
    for name, problem in found.get("graphs", {}).items():
        if problem is not None:
            _out.print(f"{name}: {problem}", soft_wrap=True)
    for name, runtime in found.get("runtimes", {}).items():
        for finding in runtime["findings"]:
            text = f"{name}: {finding['layer']}: {finding['rule']}. {finding['fix']}"
            _out.print(text, soft_wrap=True)
    if found.get("layers"):
        table = Table(title="layers against torch", title_justify="left")
        for column in ("layer", "dB"):
            table.add_column(column)
        for row in found["layers"]:
            table.add_row(row["name"], f"{row['snr_db']:.1f}")
        _out.print(table)
        _out.print(f"first layer with a flipped code: {found['first'] or 'none'}")
    _out.print("all well" if found["ok"] else "something is wrong, see above")


@app.command()
def serve(
    path: Annotated[str, typer.Argument(help="An ONNX folder, a run or a checkpoint.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", callback=_within(0, 65535), help="0 takes any that is free.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What requests call it; default: the folder's name."),
    ] = None,
    beside: Annotated[
        str | None, typer.Option("--beside", help="A second model to compare with, e.g. digits.")
    ] = None,
    provider: Provider = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", callback=_within(1, MAX_THREADS), help="Threads of one operator."
        ),
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(
            "--max-batch",
            callback=_within(2, 256),
            help="Rows in one call; an image with guidance takes two.",
        ),
    ] = 8,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes", help="The only ones to call with, e.g. 1,2,4,8; pads to them."
        ),
    ] = None,
    batching: Annotated[
        str,
        typer.Option("--batching", help="step: images join at any step; request: whole batches."),
    ] = "step",
    queue: Annotated[
        int, typer.Option("--queue", callback=_within(0, MAX_IMAGES), help="Images that may wait.")
    ] = 64,
    max_images: Annotated[
        int,
        typer.Option(
            "--max-images", callback=_within(1, MAX_BATCH), help="Most images of one request."
        ),
    ] = 10,
    max_steps: Annotated[
        int,
        typer.Option(
            "--max-steps", callback=_within(1, MAX_STEPS), help="Most denoising steps of an image."
        ),
    ] = 200,
    deadline_seconds: Annotated[
        float,
        typer.Option(
            "--deadline-seconds",
            callback=_within(0.1, _DAY),
            help="Longest answer.",
        ),
    ] = 120.0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            callback=_within(0, _DAY),
            help="After SIGTERM, to finish what was taken on.",
        ),
    ] = 30.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="Key that requests must bring; or TRTQ_API_KEY."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Another host name that the server answers to, besides localhost and its own address; "
            "may be repeated; '*' allows every name.",
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin",
            help="Origin whose pages may send requests, e.g. http://localhost:3000; may be repeated.",
        ),
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Replicas on a local Ray, which is joined or started.")
    ] = False,
    replicas: Annotated[
        str | None,
        typer.Option("--replicas", help="MIN:MAX with --ray, as many as the queue asks for."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Serve images over HTTP: OpenAI's API, health, metrics, and a page to try it.

    Example: trtq serve onnx --provider openvino --beside digits
    """
    with _command(verbose):
        from trtq.serve.http.access import allowed_hosts, allowed_origins
        from trtq.serve.logs import log_to
        from trtq.serve.options import (
            Limits,
            ServeOptions,
            parse_batch_sizes,
            parse_batching,
            read_api_key,
        )
        from trtq.serve.server import serve as run_server

        limits = Limits(
            batch=max_batch,
            batch_sizes=None if batch_sizes is None else parse_batch_sizes(batch_sizes, max_batch),
            queue=queue,
            images=max_images,
            steps=max_steps,
            deadline_s=deadline_seconds,
        )
        if replicas is not None and not on_ray:
            raise UsageError("--replicas are those of Ray Serve; add --ray")
        asked: dict[str, Any] = {
            "path": path,
            "name": name,
            "beside": beside,
            "host": host,
            "port": port,
            "provider": provider,
            "threads": threads,
            "batching": parse_batching(batching),
            "limits": limits,
            "drain_s": drain_seconds,
            "api_key": read_api_key(api_key_file),
            "allowed_hosts": allowed_hosts(allowed_host or ()),
            "allowed_origins": allowed_origins(allowed_origin or ()),
        }

        def announce(found: dict[str, Any]) -> None:
            def human(ready: dict[str, Any]) -> None:
                names = ", ".join(ready["models"])
                _err.print(f"serving {names} at {ready['url']}, ready in {ready['seconds']} s")

            _show(found, as_json, human)

        log_to(level=logging.DEBUG if verbose else logging.INFO)
        if on_ray:
            from trtq.serve.ray.local import parse_replicas, serve_on_ray
            from trtq.serve.ray.options import RayOptions

            least, most = parse_replicas(replicas or "1:2")
            chosen = RayOptions(min_replicas=least, max_replicas=most, **asked)
            serve_on_ray(chosen, announce)
        else:
            run_server(ServeOptions(**asked), announce)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for everything it makes.")
    ] = Path("trtq-demo"),
    images: Annotated[
        int,
        typer.Option("--images", callback=_within(20, MAX_IMAGES), help="Drawn with each model."),
    ] = 500,
    iterations: Annotated[
        int,
        typer.Option(
            "--iterations", callback=_within(1, MAX_ITERATIONS), help="Fine-tuning iterations."
        ),
    ] = 350,
    provider: Annotated[str, typer.Option("--provider", help="cpu or openvino.")] = "cpu",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The whole path on the digits model: quantise to W4A4, export, draw, evaluate, report.

    Example: trtq demo -o trtq-demo
    """
    from trtq.demo.digits import demo as run_demo

    with _command(verbose):
        result = run_demo(
            output,
            images=images,
            iterations=iterations,
            provider=provider,
            seed=seed,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )

        def human(found: dict[str, Any]) -> None:
            table = Table(title="digits, 20 steps", title_justify="left")
            for column in ("model", "FD", "class accuracy", "bytes"):
                table.add_column(column)
            for row in found["rows"]:
                cells = (f"{row['fd']:.2f}", f"{row['class_accuracy']:.1%}", f"{row['bytes']:,}")
                table.add_row(row["name"], *cells)
            _out.print(table)
            _out.print(f"{found['seconds']:.0f} s; open {found['report']}", soft_wrap=True)

        _show(result, as_json, human)


if __name__ == "__main__":
    app()
