"""The parts of a diffusers folder that can be read without torch: index, scheduler, classes, sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtq.checkpoint.weights import check_pointers, is_pointer
from trtq.documents import explain_first, read_object, shown
from trtq.errors import ArtefactError, UsageError
from trtq.limits import MAX_SIDE, parse_whole

__all__ = [
    "CLASSES_NAME",
    "CONFIG_NAME",
    "INDEX_NAME",
    "MAX_TRAINED",
    "SCHEDULER_NAME",
    "check_null_class",
    "class_names",
    "parse_size",
    "parse_sizes",
    "read_index",
    "read_json",
    "read_null_class",
    "read_scheduler",
]

INDEX_NAME = "model_index.json"
CLASSES_NAME = "classes.json"
CONFIG_NAME = "config.json"
SCHEDULER_NAME = "scheduler_config.json"
MAX_TRAINED = 100_000
"""Maximum number of training timesteps; diffusers' schedulers have 1000."""
_PARTS = ("scheduler", "unet", "transformer")
"""Entries that are always components; other lists of numbers are settings of the pipeline."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,128}")
_MAX_CLASSES = 1 << 24
_Word = Annotated[str, Field(strict=True, max_length=128)]
_Flag = Annotated[bool, Field(strict=True)]
_Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[_Real, Field(gt=0)]
_Share = Annotated[_Real, Field(ge=0, le=1)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        ArtefactError: the file cannot be read, is a Git LFS pointer, or holds no JSON object.
    """
    if is_pointer(path):
        check_pointers(path.parent)
    return read_object(path)


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a folder.

    Components are `[library, class]`, or `[null, null]` for a missing component; lists without text are
    settings of the pipeline.

    Raises:
        ArtefactError: the file cannot be read, or an entry is malformed.
    """
    path = folder / INDEX_NAME
    index = read_json(path)
    name = index.get("_class_name")
    if isinstance(name, list) and all(isinstance(item, str) for item in name):
        raise ArtefactError(
            f"{path} names a custom pipeline ({shown(name)}), i.e. code that is stored with the "
            "model; trtq does not run such code. If its components fit a pipeline of diffusers, write "
            "the name of that pipeline into _class_name"
        )
    if not isinstance(name, str) or not name:
        raise ArtefactError(
            f"{path}: _class_name must be the name of a pipeline, got {shown(name)}"
        )
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        if part not in _PARTS and not _is_text_list(entry):
            continue
        if not part.isidentifier() or _NAME.fullmatch(part) is None:
            raise ArtefactError(
                f"{path} names the component {shown(part)}, which is not a valid folder name"
            )
        named = len(entry) == 2 and all(
            isinstance(item, str) and _NAME.fullmatch(item) for item in entry
        )
        if not named and entry != [None, None]:
            raise ArtefactError(
                f"{path}: the component {shown(part)} must be [library, class] or [null, null], got "
                f"{shown(entry)}"
            )
    return index


def _is_text_list(entry: list[Any]) -> bool:
    return any(item is None or isinstance(item, str) for item in entry)


class _Scheduler(BaseModel):
    """The settings of a scheduler that trtq uses; diffusers checks the others."""

    model_config = ConfigDict(extra="ignore")

    class_name: _Word | None = Field(None, alias="_class_name")
    num_train_timesteps: Annotated[int, Field(strict=True, ge=1, le=MAX_TRAINED)] = 1000
    beta_start: _Share = 0.0
    beta_end: _Share = 0.0
    beta_schedule: _Word | None = None
    trained_betas: list[_Share] | None = None
    prediction_type: _Word | None = None
    timestep_spacing: _Word | None = None
    steps_offset: Annotated[int, Field(strict=True, ge=0, le=MAX_TRAINED)] = 0
    clip_sample: _Flag | None = None
    clip_sample_range: _Positive = 1.0
    set_alpha_to_one: _Flag | None = None
    thresholding: _Flag | None = None
    rescale_betas_zero_snr: _Flag | None = None
    use_dynamic_shifting: _Flag | None = None
    use_karras_sigmas: _Flag | None = None
    use_flow_sigmas: _Flag | None = None
    solver_order: Annotated[int, Field(strict=True, ge=1, le=16)] | None = None
    shift: _Positive | None = None
    base_shift: _Real | None = None
    max_shift: _Real | None = None
    base_image_seq_len: Annotated[int, Field(strict=True, ge=1, lt=1 << 31)] | None = 256
    max_image_seq_len: Annotated[int, Field(strict=True, ge=1, lt=1 << 31)] | None = 4096

    @model_validator(mode="after")
    def _can_shift(self) -> _Scheduler:
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError("base_image_seq_len and max_image_seq_len must differ")
        return self


def read_scheduler(folder: Path, part: str = "scheduler") -> dict[str, Any]:
    """The configuration of a pipeline's scheduler, with checked settings.

    Args:
        folder: folder of the pipeline.
        part: name of the scheduler's folder inside `folder`.

    Raises:
        ArtefactError: the file cannot be read, or a setting has the wrong type or is out of range.
    """
    path = folder / part / SCHEDULER_NAME
    # diffusers writes -Infinity for absent bounds.
    config = read_object(path, finite=False)
    try:
        _Scheduler.model_validate(config)
    except ValidationError as err:
        raise ArtefactError(f"{path}: {explain_first(err)}") from err
    return config


def read_null_class(folder: Path) -> int | None:
    """The label that means "no class", from a folder's `classes.json`; None if there is none.

    Raises:
        ArtefactError: the file does not hold a label.
    """
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    classes = read_json(path)
    if "null_class" not in classes:
        raise ArtefactError(f"cannot read {path}: 'null_class' is missing")
    null_class = classes["null_class"]
    if null_class is not None and not (type(null_class) is int and 0 <= null_class < _MAX_CLASSES):
        raise ArtefactError(f"{path}: null_class must be a label or null, got {shown(null_class)}")
    return null_class


def check_null_class(null_class: int | None, embeddings: int) -> None:
    """Raise unless the label that means "no class" is in range.

    Args:
        null_class: label that means "no class"; None: the model has no such label.
        embeddings: number of the model's labels, including the one for "no class".

    Raises:
        ArtefactError: the label is out of range.
    """
    if null_class is not None and not 0 <= null_class < embeddings:
        raise ArtefactError(
            f"null_class is {null_class}, but the labels of the model are 0 .. {embeddings - 1}; "
            f"correct it in {CLASSES_NAME}"
        )


def class_names(folder: Path | None, count: int) -> list[str]:
    """Names of a model's classes from its `classes.json`; their numbers if it has no names.

    Args:
        folder: folder of the pipeline; None: the pipeline has no folder.
        count: number of classes.

    Raises:
        ArtefactError: the file holds too few names, or no list of names.
    """
    path = None if folder is None else folder / CLASSES_NAME
    labels = None if path is None or not path.is_file() else read_json(path).get("labels")
    if labels is None:
        return [str(label) for label in range(count)]
    if (
        not isinstance(labels, list)
        or len(labels) < count
        or not all(type(label) in (str, int) for label in labels)
    ):
        raise ArtefactError(
            f"{path}: labels must be the names of {count} classes, got {shown(labels)}"
        )
    return [str(label) for label in labels[:count]]


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` -> (512, 768), height and width in pixels.

    Raises:
        UsageError: the text is malformed, or a side is not in 1 .. `MAX_SIDE`.
    """
    height, _, width = text.lower().partition("x")
    try:
        size = parse_whole(height), parse_whole(width)
    except ValueError:
        size = 0, 0
    if not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise UsageError(
            f"invalid size {shown(text)}; write HEIGHTxWIDTH in pixels, each in 1 .. {MAX_SIDE}, "
            "e.g. 512x512"
        )
    return size


def parse_sizes(text: str) -> tuple[str, str]:
    """`512x512:1024x1024` -> the smallest and the largest size; `512x512` -> the same size twice.

    Raises:
        UsageError: the text is malformed, or the second size is smaller than the first.
    """
    low, _, high = text.partition(":")
    high = high or low
    if any(a > b for a, b in zip(parse_size(low), parse_size(high), strict=True)):
        raise UsageError(
            f"the second of the sizes {text!r} is smaller than the first; write SMALLEST:LARGEST, e.g. "
            "512x512:1024x768"
        )
    return low, high
