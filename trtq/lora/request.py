"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtq.errors import UsageError


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA as it was asked for.

    Attributes:
        path: the file, or a folder of PEFT or diffusers that holds one.
        scale: its strength.
    """

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:SCALE]` -> a `LoraRequest`.

    Raises:
        UsageError: the scale is not a finite number, or there is no file's name.
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
