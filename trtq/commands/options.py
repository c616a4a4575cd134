"""Options that several commands share, range checks of numbers, and values for shell completion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from trtq.documents import shown
from trtq.limits import MAX_GUIDANCE, MAX_SEED, MAX_STEPS

__all__ = [
    "PROVIDERS",
    "AsJson",
    "CallFile",
    "Config",
    "Guidance",
    "ImageSize",
    "Inputs",
    "Overwrite",
    "Provider",
    "ReportFolder",
    "Seed",
    "Steps",
    "Timeout",
    "Verbose",
    "one_of",
    "output_option",
    "within",
]

PROVIDERS = ("cpu", "openvino", "cuda", "tensorrt-rtx", "tensorrt", "torch")
"""Values of `--provider`."""


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def within(min_value: float, max_value: float) -> Callable[[Any], Any]:
    """Create a check that a number is in a range; NaN is refused.

    Args:
        min_value: minimum of the range, inclusive.
        max_value: maximum of the range, inclusive.

    Returns:
        A callback for typer, which raises `typer.BadParameter` for other numbers.
    """

    def check(value: Any) -> Any:
        if value is not None and not min_value <= value <= max_value:
            number = f"{value:g}" if isinstance(value, float) else shown(value)
            raise typer.BadParameter(
                f"{number} is out of range; choose {_plain(min_value)} .. {_plain(max_value)}."
            )
        return value

    return check


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Create the shell completion of an option; the library function checks the value."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def output_option(content: str) -> Any:
    """Create the option `--output`, whose help text is a description of the output."""
    return typer.Option("-o", "--output", help=content)


ReportFolder = Annotated[Path | None, output_option("Folder for the HTML report.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of trtq at --output.")
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FOLDER|ID",
        help="Diffusers folder, or hub id, of the architecture of a single-file checkpoint. Default: "
        "the hub id that diffusers infers from the file.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object; all else goes to stderr."),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print debug messages and tracebacks to stderr.")
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        callback=within(0, MAX_SEED),
        help="Random seed; the same seed gives the same result.",
    ),
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        autocompletion=one_of(*PROVIDERS),
        help="Runtime: cpu, openvino, cuda, tensorrt-rtx or tensorrt for ONNX folders (default: cpu), "
        "torch for runs and checkpoints.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        callback=within(1, MAX_STEPS),
        help="Number of denoising steps. Default: the number used for calibration, 20 for checkpoints.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        callback=within(0, MAX_GUIDANCE),
        help="Classifier-free guidance scale; 1 or less disables it. Default: the value used for "
        "calibration.",
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--size", help="Image size in pixels, HEIGHTxWIDTH. Default: the model's own size."
    ),
]
CallFile = Annotated[
    Path | None,
    typer.Option(
        "--call",
        metavar="FILE",
        help="TOML file with arguments of the pipeline's call; files as { file = NAME }, see the page "
        "Inputs of the call.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=FILE",
        help="Argument of the pipeline's call from a file: picture, frames, mask, sound or tensor; may "
        "be repeated.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", help="Time limit for opening and calling one graph, in seconds."),
]
