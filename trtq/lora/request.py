"""A LoRA requested on the command line: file and strength."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtq.errors import UsageError

__all__ = ["LoraRequest", "parse_lora"]


@dataclass(frozen=True)
class LoraRequest:
    """A requested LoRA.

    Attributes:
        path: LoRA file, or a folder written by PEFT or diffusers that contains one.
        scale: strength of the LoRA.
    """

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:SCALE]` -> a `LoraRequest`.

    Raises:
        UsageError: the scale is not a finite number, or the name of the file is missing.
    """
    path, colon, number = text.rpartition(":")
    if not text.strip() or (colon and not path.strip()):
        raise UsageError(f"--lora {text!r} names no file; write FILE or FILE:0.8")
    if not colon or (
        len(path) == 1 and not Path(text).is_file() and number.startswith(("\\", "/"))
    ):
        return LoraRequest(Path(text))
    try:
        if Path(text).exists():
            return LoraRequest(Path(text))
        scale = float(number)
    except (OSError, ValueError):
        scale = float("nan")
    if scale != scale or abs(scale) == float("inf"):
        raise UsageError(f"--lora {text!r}: the scale {number!r} is not a number; write FILE:0.8")
    return LoraRequest(Path(path), scale)
