"""The rows of a manifest: layers, structure, source, recorded denoisers and their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from trtq.artefact.records import (
    Bits,
    Digest,
    Given,
    ModulePath,
    Number,
    Text,
)

__all__ = [
    "AxisRow",
    "FurtherRow",
    "GraphRow",
    "LayerRow",
    "RecordedRow",
    "SourceRow",
    "StructureRow",
    "check_layer_rows",
    "check_order",
    "layer_kinds",
]


_HALF_BITS = 16
"""Activation bits of a weight-only layer."""


def check_order(timesteps: list[float] | None) -> list[float] | None:
    """The timesteps, if they rise.

    Raises:
        ValueError: they do not rise from the cleanest to the noisiest.
    """
    for before, after in pairwise(timesteps or ()):
        if not before < after:
            raise ValueError(
                f"timesteps rise from the cleanest to the noisiest, got {after:g} after {before:g}"
            )
    return timesteps


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(_Strict):
    """The precision of one linear layer, convolution or product of activations.

    Attributes:
        name: module path in the denoiser.
        kind: `linear`, `conv1d`, `conv2d`, `conv3d`, `product`, or `conv_transpose`, which stays float.
        weight_bits: bits of the weight; None if there is no weight, or the layer runs in float.
        activation_bits: bits of the (first) input; 16 for a weight-only layer, whose input stays float;
            None if the layer runs in float.
        right_bits: bits of a product's second input.
        adapters: whether the layer had QALoRA adapters during fine-tuning.
        reason: reason for the choice of bits.
        input_of: an earlier layer with the same input, whose quantiser this layer uses.
        smooth: whether the channels of the input are scaled before the quantiser; those of a product
            by the weights around it.
        rotate: number of channels that a rotation of the input mixes; 0: no rotation.
        scales: origin of the activations' scales, see `trtq.quant.dynamic_scale`.
        outlier_ratio: largest channel of the input over the median channel.
        format: `int`, `weight_only`, `fp8` or `nvfp4`.
        group: number of input channels that share a scale of a weight-only layer; None: one scale per
            output channel.
    """

    name: ModulePath
    kind: Literal["linear", "conv1d", "conv2d", "conv3d", "conv_transpose", "product"]
    weight_bits: Bits | None
    activation_bits: Bits | Literal[16] | None
    right_bits: Bits | None = None
    adapters: Annotated[bool, Field(strict=True)] = False
    reason: Text
    input_of: ModulePath | None = None
    smooth: Annotated[bool, Field(strict=True)] = False
    rotate: Literal[0, 16, 64, 256] = 0
    scales: Literal["step", "row", "hybrid"] = "step"
    outlier_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    format: Literal["int", "weight_only", "fp8", "nvfp4"] = "int"
    group: Literal[32, 64, 128] | None = None

    @model_validator(mode="after")
    def _possible_format(self) -> LayerRow:
        widths = self.weight_bits, self.activation_bits
        allowed = {"weight_only": ((4, 16), (8, 16)), "fp8": ((8, 8),), "nvfp4": ((4, 4),)}
        if self.format == "int" and self.activation_bits == _HALF_BITS:
            raise ValueError(f"{self.name!r} has 16 activation bits, which integers do not have")
        if self.format != "int" and (self.kind == "product" or widths not in allowed[self.format]):
            raise ValueError(
                f"{self.name!r} is a {self.kind} of format {self.format!r}, which cannot have {widths} "
                "bits of weight and input"
            )
        if self.group is not None and (self.format != "weight_only" or self.kind != "linear"):
            raise ValueError(f"{self.name!r} is no weight-only linear layer, so it has no group")
        return self

    @model_validator(mode="after")
    def _possible(self) -> LayerRow:
        widths = (self.weight_bits, self.activation_bits, self.right_bits)
        quantized = tuple(bits is not None for bits in widths)
        whole = (False, True, True) if self.kind == "product" else (True, True, False)
        if quantized not in (whole, (False, False, False)):
            raise ValueError(
                f"{self.name!r} is of kind {self.kind!r}, which has bits of "
                + ("both inputs and of no weight" if self.kind == "product" else "weight and input")
                + f", or is float; got weight, input, second input {widths}"
            )
        if self.kind == "conv_transpose" and any(quantized):
            raise ValueError(f"{self.name!r} is a transposed convolution, which stays float")
        unquantized = not quantized[1] or self.activation_bits == _HALF_BITS
        if self.input_of is not None and (self.kind == "product" or unquantized):
            raise ValueError(f"{self.name!r} quantises no single input, so it has no input_of")
        if (self.smooth or self.rotate) and not quantized[1]:
            raise ValueError(f"{self.name!r} is not low-bit, so its input is not transformed")
        if self.rotate and self.kind == "product":
            raise ValueError(f"{self.name!r} has no weight, so its input is not rotated")
        return self


def check_layer_rows(layers: list[LayerRow]) -> list[LayerRow]:
    """The layers, if each is listed once and shared inputs fit.

    Raises:
        ValueError: a layer is listed twice, or uses the input of a layer that does not fit.
    """
    above: dict[str, LayerRow] = {}
    for row in layers:
        if row.name in above:
            raise ValueError(f"the layer {row.name!r} is listed twice")
        if row.input_of is not None:
            owner = above.get(row.input_of)
            if owner is None:
                raise ValueError(
                    f"{row.name!r} has the input of {row.input_of!r}, which is no layer before it"
                )
            fields = ("activation_bits", "format", "smooth", "rotate", "scales")
            alike = all(getattr(owner, field) == getattr(row, field) for field in fields)
            if not alike or owner.kind == "product":
                raise ValueError(
                    f"{row.name!r} has the input of {row.input_of!r}, which is quantised otherwise"
                )
        above[row.name] = row
    return layers


class StructureRow(_Strict):
    """Modules that were rewritten before quantisation.

    Attributes:
        attention: paths of attention modules that are decomposed into their products.
        splits: number of input channels of the first part, by path of a split convolution.
        ip_adapter: shapes of the tensors of IP-Adapters in the denoiser, by path.
        ip_adapter_scales: strengths of the IP-Adapters, by path of the attention processor; without an
            entry, a strength is 1.
    """

    attention: list[ModulePath] = []
    splits: dict[ModulePath, Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]] = {}
    ip_adapter: dict[ModulePath, list[Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]]] = {}
    ip_adapter_scales: dict[ModulePath, list[Number]] = {}


class SourceRow(_Strict):
    """The checkpoint or artefact that an artefact was made from.

    Attributes:
        name: name or path as given by the user.
        files: SHA-256 of its files, by path inside the source.
    """

    name: Given
    files: dict[str, Digest]


class AxisRow(_Strict):
    """A free axis of a tensor.

    Attributes:
        axis: index of the axis.
        varies: what determines the size: `batch`, `prompt`, `size`, or `calls` if the calls of one run
            differ, e.g. those with and without the prompt.
        low: smallest size.
        high: largest size; None: no limit.
        seen: size in the user's own call; None in artefacts of earlier versions.
    """

    axis: Annotated[int, Field(strict=True, ge=0, lt=64)]
    varies: Literal["batch", "prompt", "size", "calls"]
    low: Annotated[int, Field(strict=True, ge=0)]
    high: Annotated[int, Field(strict=True, ge=0)] | None = None
    seen: Annotated[int, Field(strict=True, ge=0)] | None = None


class GraphRow(_Strict):
    """A graph of a recorded denoiser: the calls that the graph can compute.

    Attributes:
        folder: folder of the graph.
        template: the arguments of the call, see `trtq.calls.form.CallForm`.
        output: nesting of the result, in the same form; its tensors are outputs of the graph.
        free: free axes of each tensor, by path.
        fixed: reason why the graph does not support other values, by what it does not support: `batch`,
            `prompt`, `size` or `calls`.
        processors: class and settings of the attention processors that the pipeline sets during its
            call, by path, see `trtq.calls.processors`.
    """

    folder: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,63}(\.[a-z0-9]{1,15})?$")]
    template: dict[str, Any]
    output: dict[str, Any]
    free: dict[Text, list[AxisRow]] = {}
    fixed: dict[Text, Given] = {}
    processors: dict[ModulePath, Given] = {}


class RecordedRow(_Strict):
    """How a pipeline calls a denoiser, as recorded while it ran.

    Attributes:
        timestep: path of the timestep in the arguments of the denoiser's call.
        calls: number of the denoiser's calls during one call of the pipeline.
        model: class name of the denoiser.
        graphs: graphs of the denoiser; empty for a run.
    """

    timestep: Text
    calls: Annotated[int, Field(strict=True, ge=1)]
    model: Text
    graphs: list[GraphRow] = []


class FurtherRow(_Strict):
    """A further denoiser of a pipeline; see `Manifest` for the attributes."""

    denoiser: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    timesteps: Annotated[list[Number], Field(min_length=1)] | None = None
    layers: list[LayerRow] = []
    structure: StructureRow = StructureRow()
    recorded: RecordedRow

    @field_validator("timesteps")
    @classmethod
    def _cleanest_first(cls, timesteps: list[float] | None) -> list[float] | None:
        return check_order(timesteps)

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[LayerRow]) -> list[LayerRow]:
        return check_layer_rows(layers)


def layer_kinds(rows: Sequence[LayerRow]) -> dict[str, str]:
    """Kind and precision of every layer by its name, e.g. `conv2d w4a8`."""
    kinds = {}
    for row in rows:
        widths = (("w", row.weight_bits), ("a", row.activation_bits), ("a", row.right_bits))
        precision = "".join(f"{what}{bits}" for what, bits in widths if bits is not None)
        if row.format in ("fp8", "nvfp4"):
            precision = row.format
        if row.group is not None:
            precision += f" in groups of {row.group}"
        kinds[row.name] = f"{row.kind} {precision or 'float'}"
    return kinds
