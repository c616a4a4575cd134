"""What the free-form parts of a manifest may hold: every key that is read anywhere, with type and range.

A manifest keeps them as plain objects, since each stage adds keys of its own. Whatever reads a key
relies on these types, so they are checked once, when the manifest is read or made. A key that is not
listed here is read by nothing but `trtq inspect`, which prints it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtq.documents import check_depth, explain_first, shown
from trtq.limits import (
    MAX_BATCH,
    MAX_GUIDANCE,
    MAX_ITERATIONS,
    MAX_SIDE,
    MAX_STEPS,
    parse_whole,
)

__all__ = [
    "Bits",
    "Digest",
    "FileName",
    "Given",
    "Metrics",
    "ModulePath",
    "Number",
    "Options",
    "RecipeRow",
    "Text",
    "checked_by",
    "path_fault",
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_NAME_BYTES, _PATH_BYTES = 255, 2048
_TEXT = 4096
_MAX_BYTES = 1 << 60


def path_fault(relative: str) -> str | None:
    """What is wrong with the name of a file inside a folder; None: nothing, on any system."""
    if not relative or len(relative.encode("utf-8", "replace")) > _PATH_BYTES:
        return "is empty or too long"
    if _CONTROL.search(relative):
        return "holds a control character"
    if any(mark in relative for mark in ("\\", ":")) or relative.startswith("/"):
        return "leaves the folder"
    for part in relative.split("/"):
        if part == "..":
            return "leaves the folder"
        if part in ("", "."):
            return "is not in normal form"
        if _WINDOWS.fullmatch(part):
            return "is a device name on Windows"
        if part.endswith((".", " ")) or any(mark in part for mark in '<>"|?*'):
            return "is not valid on Windows"
        if len(part.encode("utf-8", "replace")) > _NAME_BYTES:
            return "is too long"
    return None


def _text(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("it holds a control character")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise ValueError("it holds half of a surrogate pair") from err
    return value


def _file_name(value: str) -> str:
    fault = path_fault(value)
    if fault is not None:
        raise ValueError(f"the name of the file {shown(value)} {fault}; do not use it")
    return value


def _size(value: str) -> str:
    sides = []
    for one in value.split(":"):
        height, _, width = one.partition("x")
        sides.append((parse_whole(height), parse_whole(width)))
    if len(sides) > 2 or not all(1 <= side <= MAX_SIDE for pair in sides for side in pair):
        raise ValueError(
            f"a size is HEIGHTxWIDTH or SMALLEST:LARGEST, of 1 .. {MAX_SIDE} pixels a side"
        )
    if any(low > high for low, high in zip(sides[0], sides[-1], strict=True)):
        raise ValueError("the largest size is smaller than the smallest")
    return value


Text = Annotated[str, Field(strict=True, max_length=_TEXT), AfterValidator(_text)]
Given = Annotated[str, Field(strict=True, max_length=_TEXT, pattern=r"^[^\x00]*$")]
"""A name or path that a user gave; his folders may be called as he likes."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bits = Annotated[int, Field(strict=True, ge=2, le=8)]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
ModulePath = Annotated[
    str, Field(strict=True, max_length=512, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")
]
FileName = Annotated[str, Field(strict=True), AfterValidator(_file_name)]
_Flag = Annotated[bool, Field(strict=True)]
_Bytes = Annotated[int, Field(strict=True, ge=0, le=_MAX_BYTES)]
_Seconds = Annotated[Number, Field(ge=0)]
_Batch = Annotated[int, Field(strict=True, ge=1, le=2 * MAX_BATCH)]
_Axis = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
_Size = Annotated[Text, AfterValidator(_size)]
_Word = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
_Widths = Annotated[str, Field(strict=True, pattern=r"^w[2-8]a[2-8]$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Training(_Record):
    rank: Annotated[int, Field(strict=True, ge=0, le=65536)] = 0
    base: Literal["fp", "int"] = "fp"
    iterations: Annotated[int, Field(strict=True, ge=1, le=MAX_ITERATIONS)] = 1
    batch: Annotated[int, Field(strict=True, ge=1)] = 1


class _Calibration(_Record):
    images: Annotated[int, Field(strict=True, ge=1)] = 1
    batch: Annotated[int, Field(strict=True, ge=1)] = 1
    share_inputs: _Flag = True


class _Attention(_Record):
    quantize: _Flag = False
    probability_bits: Bits | Literal["float"] = 8


class RecipeRow(_Record):
    """The keys of `recipe` that are read: those of `trtq.calib.recipe.Recipe`."""

    method: _Word | None = None
    bits: _Widths | None = None
    tables: Literal["per-step", "static"] = "per-step"
    steps: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=MAX_GUIDANCE)] | None = None
    prompts: Given | None = None
    size: _Size | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0
    policy: Given | None = None
    budget: Text | None = None
    split_skips: _Flag = False
    attention: _Attention = _Attention()
    calibration: _Calibration = _Calibration()
    training: _Training | None = None
    quest: dict[str, Any] | None = None


class Options(_Record):
    """The keys of `options` that are read."""

    target: Literal["qdq", "plugin"] | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: Annotated[list[_Batch], Field(min_length=2, max_length=2)] | None = None
    size: _Size | None = None
    backend: Literal["tensorrt-rtx", "tensorrt"] | None = None
    version: _Word | None = None
    architectures: Annotated[list[_Word], Field(max_length=64)] | None = None
    weight_streaming: _Flag = False
    refit: _Flag = False
    workspace_bytes: _Bytes | None = None
    profiles: dict[
        str, dict[str, Annotated[list[list[_Axis]], Field(min_length=3, max_length=3)]]
    ] = {}
    graph_metadata: dict[Text, Annotated[str, Field(strict=True)]] = {}

    @model_validator(mode="after")
    def _in_order(self) -> Options:
        if self.batch is not None and self.batch[0] > self.batch[1]:
            raise ValueError(f"batch must be the smallest and the largest, got {self.batch}")
        for graph, inputs in self.profiles.items():
            for name, (low, often, high) in inputs.items():
                ranges = zip(low, often, high, strict=False)
                if not len(low) == len(often) == len(high) or any(
                    not a <= b <= c for a, b, c in ranges
                ):
                    raise ValueError(
                        f"profiles.{graph}.{name} must be the smallest, most frequent and largest shape"
                    )
        return self


class _EngineRow(_Record):
    name: Text | None = None
    engine_bytes: _Bytes = 0
    build_seconds: _Seconds = 0.0


class Metrics(_Record):
    """The keys of `metrics` that are read."""

    layers_quantized: Annotated[int, Field(strict=True, ge=0)] = 0
    layers_float: Annotated[int, Field(strict=True, ge=0)] = 0
    bytes_before: _Bytes | None = None
    bytes_after: _Bytes | None = None
    engines: list[_EngineRow] = []


def checked_by(record: type[BaseModel]) -> Callable[[Any], Any]:
    """A check that leaves an object as it is, if the keys that `record` lists have its types.

    The check raises a ValueError that names the key.
    """

    def check(value: dict[str, Any]) -> dict[str, Any]:
        check_depth(value)
        try:
            record.model_validate(value)
        except ValidationError as err:
            raise ValueError(explain_first(err)) from err
        return value

    return check
