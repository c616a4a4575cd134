"""Prompts of a text-to-image model: to calibrate with, and to judge by.

A model's folder may hold `prompts.json`:

    {"guidance": 3.0,
     "calibration": ["a red circle", ...],
     "evaluation": [{"prompt": "a red circle", "labels": {"first_colour": 0, ...}}, ...]}

`labels` are what the model's own classifier must see in the picture. A model without the file is
calibrated on the general prompts in `calib/prompts`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtq.errors import ArtefactError, UsageError
from trtq.outputs import refuse_special

__all__ = [
    "PROMPTS_NAME",
    "JudgedPrompt",
    "PromptSet",
    "general_prompts",
    "load_prompts",
    "read_lines",
]

PROMPTS_NAME = "prompts.json"
DEFAULT_GUIDANCE = 7.5


class JudgedPrompt(BaseModel):
    """A prompt, and the values that a classifier must find for its questions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    labels: dict[str, int] = {}


class PromptSet(BaseModel):
    """The prompts of a model.

    Attributes:
        guidance: classifier-free guidance that the model is meant for.
        calibration: at least one.
        evaluation: may be empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float = Field(DEFAULT_GUIDANCE, ge=0)
    calibration: tuple[str, ...] = Field(min_length=1)
    evaluation: tuple[JudgedPrompt, ...] = ()


def read_lines(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one per line.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    refuse_special(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read the prompts {path}: {err}") from err
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise UsageError(f"{path} holds no prompts; write one per line")
    return lines


def general_prompts() -> PromptSet:
    """Prompts about this and that, for models that bring none."""
    text = (files("trtq") / "calib" / "prompts" / "general.txt").read_text(encoding="utf-8")
    return PromptSet(calibration=tuple(text.splitlines()))


def load_prompts(folder: Path | None) -> PromptSet:
    """The prompts of a model's folder, or the general ones.

    Raises:
        ArtefactError: its file is not of that form.
    """
    if folder is None or not (folder / PROMPTS_NAME).is_file():
        return general_prompts()
    try:
        return PromptSet.model_validate_json((folder / PROMPTS_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as err:
        raise ArtefactError(f"cannot read {folder / PROMPTS_NAME}: {err}") from err
