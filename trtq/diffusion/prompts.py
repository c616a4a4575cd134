"""Prompts of a text-to-image model for calibration and for evaluation.

A model's folder may hold `prompts.json`:

    {"guidance": 3.0,
     "calibration": ["a red circle", ...],
     "evaluation": [{"prompt": "a red circle", "labels": {"first_colour": 0, ...}}, ...]}

`labels` are the labels that the model's classifier must assign to the image. A model without this file
is calibrated on the general prompts in `calib/prompts`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from trtq.documents import explain_first, read_object, read_text, shown
from trtq.errors import ArtefactError, UsageError
from trtq.limits import MAX_GUIDANCE

__all__ = [
    "PROMPTS_NAME",
    "JudgedPrompt",
    "PromptSet",
    "general_prompts",
    "load_prompts",
    "read_lines",
    "recommended_guidance",
]

PROMPTS_NAME = "prompts.json"
DEFAULT_GUIDANCE = 7.5
MAX_CHARACTERS = 32_768
"""Maximum length of a prompt; text encoders read a few hundred tokens."""


def _prompt(value: str) -> str:
    fault = _fault(value)
    if fault is not None:
        raise ValueError(f"the prompt {fault}")
    return value


_Prompt = Annotated[str, Field(strict=True), AfterValidator(_prompt)]


class JudgedPrompt(BaseModel):
    """A prompt and the expected labels of the image, by attribute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: _Prompt
    labels: dict[str, Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]] = {}


class PromptSet(BaseModel):
    """The prompts of a model.

    Attributes:
        guidance: recommended classifier-free guidance scale.
        calibration: prompts for calibration, at least one.
        evaluation: prompts for evaluation; may be empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float = Field(
        DEFAULT_GUIDANCE, strict=True, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False
    )
    calibration: tuple[_Prompt, ...] = Field(min_length=1)
    evaluation: tuple[JudgedPrompt, ...] = ()


def read_lines(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one per line.

    Raises:
        UsageError: the file cannot be read, or holds no prompts.
    """
    text = read_text(path, "the prompts", error=UsageError)
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise UsageError(f"{path} holds no prompts; write one per line")
    for number, line in enumerate(lines, 1):
        fault = _fault(line)
        if fault is not None:
            raise UsageError(f"{path}: prompt {number} ({shown(line)}) {fault}")
    return lines


def _fault(prompt: str) -> str | None:
    """The reason why a prompt is invalid, or None."""
    if len(prompt) > MAX_CHARACTERS:
        return f"has {len(prompt)} characters; at most {MAX_CHARACTERS} are allowed"
    return "holds a NUL character" if "\0" in prompt else None


def general_prompts() -> PromptSet:
    """General prompts for models without their own."""
    text = (files("trtq") / "calib" / "prompts" / "general.txt").read_text(encoding="utf-8")
    return PromptSet(calibration=tuple(text.splitlines()))


def load_prompts(folder: Path | None) -> PromptSet:
    """The prompts in a model's folder, or the general prompts.

    Args:
        folder: folder of the pipeline; None: the pipeline has no folder.

    Raises:
        ArtefactError: the file of prompts is malformed.
    """
    if folder is None or not (folder / PROMPTS_NAME).is_file():
        return general_prompts()
    path = folder / PROMPTS_NAME
    try:
        return PromptSet.model_validate(read_object(path))
    except ValidationError as err:
        raise ArtefactError(f"cannot read {path}: {explain_first(err)}") from err


def recommended_guidance(prompts: PromptSet | None, classes: int | None) -> float | None:
    """Guidance scale of a model's own call if the user gives none; None: the default of its pipeline.

    Args:
        prompts: prompts of the model; None: the model takes no text.
        classes: number of the model's classes; None: it has none.
    """
    if classes is not None:
        # `DiTPipeline` takes 1000 for "no class", which is out of range for models of fewer classes.
        return 1.0
    if prompts is None or prompts == general_prompts():
        return None
    return prompts.guidance
