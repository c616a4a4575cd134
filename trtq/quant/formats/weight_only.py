"""Weight-only layers: symmetric 4- or 8-bit codes of the weight, activations in float.

    w[n, k] ~ (codes[n, k] - 2**(bits - 1)) * d[n, k // G]        codes 0 .. 2**bits - 1
    y = x w^T + bias

A linear layer has one scale `d` per output channel n and group of G input channels, or per output
channel; a convolution has one per output channel. Scales are half-precision numbers, so graphs in half
and in single precision hold the same scales. This is the INT4 form that TensorRT itself has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError
from trtq.precision import Method
from trtq.quant.activation import ZeroPointMode
from trtq.quant.deployed import ExactBuffers
from trtq.quant.formats.files import checked_tensor
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import TransformTensors, transform_entries
from trtq.quant.layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from trtq.quant.modules import QuantLayer
from trtq.quant.packed_codes import register_codes
from trtq.quant.packing import PackedWeight
from trtq.quant.ranges import row_qparams
from trtq.quant.tensors import ActivationTensors, merged_bias
from trtq.quant.timestep import Step, TimestepTable
from trtq.quant.weightless import WeightlessLayer

__all__ = [
    "WEIGHT_ONLY_LAYERS",
    "DeployedWeightOnly",
    "GroupedWeight",
    "WeightOnlyTensors",
    "half_scale",
    "spread_scale",
]

_SMALLEST = 2.0**-24
"""The smallest positive half-precision number."""


class _HalfSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp_min(_SMALLEST).half().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def half_scale(scale: Tensor) -> Tensor:
    """Positive half-precision numbers as float32; the gradient passes straight through."""
    result: Tensor = _HalfSte.apply(scale)  # type: ignore[no-untyped-call]
    return result


def spread_scale(values: Tensor, group: int | None) -> Tensor:
    """`[N, K / G]` -> `[N, K]`; without groups unchanged."""
    return values if group is None else values.repeat_interleave(group, 1)


@dataclass(frozen=True, eq=False)
class GroupedWeight(PackedWeight):
    """A weight whose scales belong to groups of input channels.

    Attributes:
        codes: weight codes, uint8 `[N, K, ...]`.
        scale: scales, float32 `[N, K / G]`; without groups `[N, 1, ...]`. Half-precision numbers.
        zero_point: `2**(bits - 1)`, float32, shaped like the scales.
        bits: width of the codes, 4 or 8.
        group: number G of input channels that share a scale; None: one scale per output channel.
    """

    group: int | None = None

    def integers(self) -> Tensor:
        """`codes - 2**(bits - 1)` as int8[N, K, ...]."""
        return (self.codes.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)

    def dequantize(self) -> Tensor:
        """The float32[N, K, ...] values that the codes represent."""
        return self.integers().float() * spread_scale(self.scale, self.group)


class _Unquantized(nn.Module):
    """Takes the place of an input quantiser and returns the input unchanged."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x[B, ...] -> x."""
        return x


class _WeightOnly(QuantLayer):
    """A layer whose weight alone is quantised; see `QuantLayer` for the arguments.

    Args:
        *args: positional arguments of `QuantLayer`.
        group: number of input channels that share a scale, for a linear layer; None: one scale per
            output channel.
        **kwargs: further arguments of `QuantLayer`; `activation_bits` has no effect.
    """

    group: int | None

    def __init__(self, *args: Any, group: int | None = None, **kwargs: Any) -> None:
        # The base class quantises the weight in its constructor.
        object.__setattr__(self, "group", group)
        super().__init__(*args, **kwargs)

    def _make_activation(self, bits: int, table: TimestepTable, mode: ZeroPointMode) -> Any:
        return _Unquantized()

    def _weight_range(self, method: Method) -> tuple[Tensor, Tensor]:
        weight = self.weight.detach().float()
        rows = weight.flatten(1) if self.group is None else weight.reshape(-1, self.group)
        scale, zero_point = row_qparams(
            rows,
            rows.amin(1),
            rows.amax(1),
            self.weight_bits,
            method,
            symmetric=True,
            contain_zero=True,
        )
        shape = (
            (len(weight), *(1,) * (weight.ndim - 1)) if self.group is None else (len(weight), -1)
        )
        return half_scale(scale).reshape(shape), zero_point.reshape(shape)

    def spread(self, values: Tensor) -> Tensor:
        """Scales as half-precision numbers, or zero points, shaped to broadcast over the weight."""
        return spread_scale(half_scale(values), self.group)

    def _packed(self, codes: Tensor) -> GroupedWeight:
        scale = half_scale(self.weight_scale.detach())
        zero_point = self.weight_zero_point.clone()
        return GroupedWeight.of(codes, scale, zero_point, self.weight_bits, group=self.group)

    def extra_repr(self) -> str:
        """Shape, bits, group and rank."""
        return f"{super().extra_repr()}, group={self.group}"


class _WeightOnlyLinear(_WeightOnly, QuantLinear):
    pass


class _WeightOnlyConv1d(_WeightOnly, QuantConv1d):
    pass


class _WeightOnlyConv2d(_WeightOnly, QuantConv2d):
    pass


class _WeightOnlyConv3d(_WeightOnly, QuantConv3d):
    pass


WEIGHT_ONLY_LAYERS: dict[str, type[_WeightOnly]] = {
    "linear": _WeightOnlyLinear,
    "conv1d": _WeightOnlyConv1d,
    "conv2d": _WeightOnlyConv2d,
    "conv3d": _WeightOnlyConv3d,
}
"""The quantised class of each kind of layer with a weight."""


@dataclass(frozen=True, eq=False)
class WeightOnlyTensors:
    """Tensors of one deployed weight-only layer.

    Attributes:
        weight: codes and scales of the weight, `[N, K, ...]`.
        bias: float32 `[N]`; None: no bias.
        transform: transform of the input; None: the input is not transformed.
    """

    weight: GroupedWeight
    bias: Tensor | None
    transform: TransformTensors | None = None

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name: none."""
        return {}

    @property
    def precision(self) -> str:
        """Precision as text: `w4a16` or `w8a16`."""
        return f"w{self.weight.bits}a16"

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> WeightOnlyTensors:
        """Codes of a trained layer, with its adapters merged.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
        """
        weight = layer.merge()
        assert isinstance(weight, GroupedWeight)
        if not bool(torch.isfinite(weight.scale).all()):
            raise NonFiniteError("the weight scale is not a finite half-precision number")
        return cls(weight, merged_bias(layer))

    def tensors(self) -> dict[str, Tensor]:
        """The layer's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        named = {"weight.codes": self.weight.packed, "weight.scale": self.weight.scale.half()}
        named |= transform_entries(self.transform)
        return named if self.bias is None else named | {"bias": self.bias}

    @classmethod
    def from_tensors(
        cls, named: Mapping[str, Tensor], *, shape: torch.Size, bits: int, group: int | None
    ) -> WeightOnlyTensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            shape: shape of the float weight, `[N, K, ...]`.
            bits: width of the codes.
            group: see `GroupedWeight`.

        Raises:
            ArtefactError: a tensor is missing, or does not fit the layer.
        """
        channels, *rest = shape
        if group is not None and rest[0] % group:
            raise ArtefactError(
                f"the manifest says groups of {group}, which do not divide {rest[0]} input channels"
            )
        groups = [1] * len(rest) if group is None else [rest[0] // group]
        codes = checked_tensor(
            named, "weight.codes", (-(-channels * bits // 8), *rest), torch.uint8
        )
        half = checked_tensor(
            named, "weight.scale", (channels, *groups), torch.float16, positive=True
        )
        scale = half.float()
        weight = GroupedWeight(
            codes,
            scale,
            torch.full_like(scale, 2.0 ** (bits - 1)),
            bits,
            channels,
            group,
        )
        bias = named.get("bias")
        return cls(weight, None if bias is None else bias.float())


class DeployedWeightOnly(ExactBuffers, WeightlessLayer):
    """A weight-only linear layer or convolution in float32; the reference for every engine.

    Args:
        tensors: codes and scales of the layer.
        geometry: geometry of a convolution; None for a linear layer.
        packed: whether the codes are unpacked in each call, see `trtq.quant.packed_codes`.
    """

    bias: Tensor | None
    weight_scale: Tensor
    integers: Tensor

    def __init__(
        self, tensors: WeightOnlyTensors, geometry: ConvGeometry | None, *, packed: bool = False
    ) -> None:
        weight = tensors.weight
        super().__init__(weight.shape, geometry)
        self.geometry = geometry
        self.group = weight.group
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", weight.scale)
        register_codes(self, "integers", weight.integers, weight.shape, torch.int8, packed=packed)

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """input[B, ...] -> the layer's output, with the dtype of the input.

        Args:
            input: input; named as in `nn.Linear`.
            step: index of the denoising step, on which nothing depends.
        """
        # The layer stores at most one byte per weight; the float copy exists only during the call.
        weight = self.integers.float() * spread_scale(self.weight_scale.float(), self.group)
        x, bias = input.float(), None if self.bias is None else self.bias.float()
        if self.geometry is None:
            out = nn.functional.linear(x, weight, bias)
        else:
            out = self.geometry.convolve(x, weight, bias)
        return out.to(input.dtype)
