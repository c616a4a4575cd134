"""Typed recipe, options and metrics of a manifest: every key that trtq reads, with its default.

Keys that are not listed here, such as those of later versions, are kept unchanged when a manifest is
rewritten; only `trtq inspect` prints them. Keys that a manifest does not hold are not added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from trtq.artefact.records import Bits, Digest, Given, Number, Text
from trtq.documents import check_depth, explain_first
from trtq.limits import (
    MAX_BATCH,
    MAX_GUIDANCE,
    MAX_ITERATIONS,
    MAX_SIDE,
    MAX_STEPS,
    parse_whole,
)

__all__ = [
    "EngineMetrics",
    "EngineOptions",
    "ExportOptions",
    "LoraRecord",
    "Metrics",
    "RecipeRecord",
    "Record",
    "parsed_as",
]

_MAX_BYTES = 1 << 60


def _size(value: str) -> str:
    sides = []
    for text in value.split(":"):
        height, _, width = text.partition("x")
        sides.append((parse_whole(height), parse_whole(width)))
    if len(sides) > 2 or not all(1 <= side <= MAX_SIDE for pair in sides for side in pair):
        raise ValueError(
            f"a size is HEIGHTxWIDTH or SMALLEST:LARGEST, of 1 .. {MAX_SIDE} pixels a side"
        )
    if any(low > high for low, high in zip(sides[0], sides[-1], strict=True)):
        raise ValueError("the largest size is smaller than the smallest")
    return value


_Flag = Annotated[bool, Field(strict=True)]
_Bytes = Annotated[int, Field(strict=True, ge=0, le=_MAX_BYTES)]
_Seconds = Annotated[Number, Field(ge=0)]
_Batch = Annotated[int, Field(strict=True, ge=1, le=2 * MAX_BATCH)]
_Axis = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
_Size = Annotated[Text, AfterValidator(_size)]
_Word = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
_Widths = Annotated[str, Field(strict=True, pattern=r"^w[2-8]a([2-8]|16)$")]


class Record(BaseModel):
    """A part of a manifest: typed keys, and any other keys unchanged."""

    model_config = ConfigDict(extra="allow", frozen=True)

    _keys: tuple[str, ...] = PrivateAttr(default=())
    """The given keys, in their order."""

    @model_validator(mode="wrap")
    @classmethod
    def _remember_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        record = handler(value)
        if isinstance(value, Mapping):
            record._keys = tuple(value)
        return record

    @model_serializer(mode="wrap")
    def _given_keys_only(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: values[key] for key in self._keys}

    def to_json(self) -> dict[str, Any]:
        """The keys that the manifest holds, as `json.dumps` accepts them."""
        return self.model_dump(mode="json")

    def updated(self, values: Mapping[str, Any]) -> Self:
        """This record with other values for some keys.

        Raises:
            ValueError: a value has the wrong type.
        """
        return type(self).model_validate(self.to_json() | dict(values))


class _Training(Record):
    rank: Annotated[int, Field(strict=True, ge=0, le=65536)] = 0
    base: Literal["fp", "int"] = "fp"
    iterations: Annotated[int, Field(strict=True, ge=1, le=MAX_ITERATIONS)] = 1
    batch: Annotated[int, Field(strict=True, ge=1)] = 1


class _Calibration(Record):
    images: Annotated[int, Field(strict=True, ge=1)] = 1
    batch: Annotated[int, Field(strict=True, ge=1)] = 1
    share_inputs: _Flag = True


class _Attention(Record):
    quantize: _Flag = False
    probability_bits: Bits | Literal["float"] = 8


class RecipeRecord(Record):
    """How a model was quantised; see `trtq.calib.recipe.Recipe` for the keys."""

    method: _Word | None = None
    bits: _Widths | None = None
    format: Literal["int", "fp8", "nvfp4"] = "int"
    group: Annotated[int, Field(strict=True, ge=0, le=128)] | None = None
    tables: Literal["per-step", "static"] = "per-step"
    steps: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=MAX_GUIDANCE)] | None = None
    prompts: Given | None = None
    size: _Size | None = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0
    policy: Given | None = None
    budget: Text | None = None
    scales: Literal["step", "row", "hybrid", "auto"] = "step"
    smooth: _Flag = False
    rotate: Literal[0, 16, 64, 256] = 0
    split_skips: _Flag = False
    attention: _Attention = _Attention()
    calibration: _Calibration = _Calibration()
    training: _Training | None = None
    quest: dict[str, Any] | None = None
    blockwise: dict[str, Any] | None = None

    @property
    def guided(self) -> bool:
        """Whether conditional and unconditional items are denoised in one batch."""
        return "guidance" not in self.model_fields_set or self.guidance not in (None, 1.0)


class ExportOptions(Record):
    """Options of an export.

    Attributes:
        target: form of the low-bit layers.
        precision: precision of everything that is not an integer.
        batch: minimum and maximum batch size, in images, of engines of the graphs.
        size: image size `HEIGHTxWIDTH` in pixels, or a range `SMALLEST:LARGEST`.
    """

    target: Literal["qdq", "plugin"] | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: tuple[_Batch, _Batch] = (1, 1)
    size: _Size | None = None

    @model_validator(mode="after")
    def _batch_in_order(self) -> Self:
        if self.batch[0] > self.batch[1]:
            raise ValueError(f"batch must be the smallest and the largest, got {list(self.batch)}")
        return self


_Shapes = Annotated[list[list[_Axis]], Field(min_length=3, max_length=3)]


class EngineOptions(ExportOptions):
    """Options of a build, and of the export before it.

    Attributes:
        backend: backend that built the engines and runs them.
        version: version of the backend.
        architectures: GPU architectures that the engines run on, e.g. `sm86`.
        weight_streaming: whether weights may stay on the host.
        refit: whether weights can be exchanged in the finished engines.
        workspace_bytes: maximum scratch memory on the device for one operator; None: no limit was set.
        fuse: whether plugins compute more than their layers, where the backend allows it.
        profiles: minimum, typical and maximum shape of every input, by graph and input.
        graph_metadata: metadata of the denoiser's graph, which an engine does not keep.
        call_metadata: metadata of the graphs of recorded calls, by folder.
    """

    backend: Literal["tensorrt-rtx", "tensorrt"] | None = None
    version: _Word | None = None
    architectures: Annotated[list[_Word], Field(max_length=64)] | None = None
    weight_streaming: _Flag = False
    refit: _Flag = False
    workspace_bytes: _Bytes | None = None
    fuse: _Flag = False
    profiles: dict[str, dict[str, _Shapes]] = {}
    graph_metadata: dict[Text, Annotated[str, Field(strict=True)]] = {}
    call_metadata: dict[Text, dict[Text, Annotated[str, Field(strict=True)]]] = {}

    @model_validator(mode="after")
    def _shapes_in_order(self) -> Self:
        for graph, inputs in self.profiles.items():
            for name, (low, often, high) in inputs.items():
                ranges = zip(low, often, high, strict=False)
                if not len(low) == len(often) == len(high) or any(
                    not a <= b <= c for a, b, c in ranges
                ):
                    raise ValueError(
                        f"profiles.{graph}.{name} must be the smallest, typical and largest shape"
                    )
        return self


class EngineMetrics(Record):
    """Measurements of one engine's build; None for those that the manifest does not hold."""

    name: Text | None = None
    engine_bytes: _Bytes | None = None
    build_seconds: _Seconds | None = None
    precisions: dict[Text, Annotated[int, Field(strict=True, ge=0)]] = {}


class Metrics(Record):
    """Measurements taken while an artefact was made; None for those that the manifest does not hold."""

    layers_quantized: Annotated[int, Field(strict=True, ge=0)] | None = None
    layers_float: Annotated[int, Field(strict=True, ge=0)] | None = None
    bytes_before: _Bytes | None = None
    bytes_after: _Bytes | None = None
    engines: list[EngineMetrics] = []


class LoraRecord(BaseModel):
    """A merged LoRA; see `trtq.lora.MergedLora` for the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Given
    sha256: Digest
    scale: Number
    modules: Annotated[int, Field(strict=True, ge=0)]


_R = TypeVar("_R", bound=BaseModel)


def parsed_as(record: type[_R]) -> Callable[[Any], _R]:
    """Return a parser of a record, for a pydantic validator.

    The parser raises a ValueError that names the key.
    """

    def parse(value: Any) -> _R:
        if isinstance(value, record):
            return value
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        check_depth(value)
        try:
            return record.model_validate(value)
        except ValidationError as err:
            raise ValueError(explain_first(err)) from err

    return parse
