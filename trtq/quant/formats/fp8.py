"""FP8 layers: weights and activations in E4M3, with the scales outside the product.

    k = e4m3(clip(x / s[t], -448, 448))      one scale per denoising step t
    c = e4m3(w / d)                          one scale per output channel
    y = op(k, c) * (d * s[t]) + bias

E4M3 (`float8_e4m3fn`) has 4 significant bits between 2**-6 and 448, and steps of 2**-9 below. Rounding
is half to even, as in torch, onnxruntime and NVIDIA's instructions. The relative error does not depend
on the scale, so ranges are not searched: the largest recorded value (with `HEADROOM`) becomes 448.
Gradients pass straight through the rounding; the gradient of a scale is that of `fake_quant`, with the
rounded number in place of the integer code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import NonFiniteError, QuantizationError
from trtq.precision import Method
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode, per_item, select_step
from trtq.quant.deployed import ExactBuffers, enclosing_step
from trtq.quant.formats.files import checked_tensor
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import TransformTensors, transform_entries
from trtq.quant.layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from trtq.quant.modules import QuantLayer
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, merged_bias, merged_scale
from trtq.quant.timestep import Step, TimestepTable, current_step
from trtq.quant.weightless import WeightlessLayer

__all__ = [
    "FP8_LAYERS",
    "FP8_MAX",
    "HEADROOM",
    "DeployedFp8",
    "FloatActivation",
    "FloatQuantizer",
    "Fp8Tensors",
    "Fp8Weight",
    "e4m3",
    "float_range",
]

FP8_MAX = 448.0
"""The largest number of E4M3."""
HEADROOM = 1.0
"""Ratio of the largest number to the code of the largest recorded value. Recorded ranges are extended
for unseen images already, see `trtq.calib.record.Recording.extremes`; larger values saturate."""
_FLOOR = 1e-8
_LEVELS = 8.0
"""Distance of neighbouring codes between 64 and 128, where weights of usual size lie."""


def e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers, float32, saturated at 448; halves round to even."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


class _FakeE4M3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, reciprocal: bool) -> Tensor:
        ratio = x.float() * scale.reciprocal() if reciprocal else x.float() / scale
        ctx.save_for_backward(ratio, scale)
        return (e4m3(ratio) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ratio, scale = ctx.saved_tensors
        gradient = gradients[0]
        inside = ratio.abs() <= FP8_MAX
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient * inside
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, e4m3(ratio) - ratio, ratio.sign() * FP8_MAX)
            grad_scale = (slope * gradient).sum_to_size(scale.shape)
        return grad_x, grad_scale, None


def fake_e4m3(x: Tensor, scale: Tensor, *, reciprocal: bool = False) -> Tensor:
    """`e4m3(x / scale) * scale`, differentiable in both; see `trtq.quant.fake_quant.fake_quant`."""
    result: Tensor = _FakeE4M3.apply(x, scale, reciprocal)  # type: ignore[no-untyped-call]
    return result


def float_range(low: Tensor, high: Tensor, largest: float = FP8_MAX) -> tuple[Tensor, Tensor]:
    """Scales that give the larger end of each range the code `largest`, and zero points of 0.

    Args:
        low: lower ends of the ranges, any shape.
        high: upper ends of the ranges, same shape.
        largest: the largest code.

    Returns:
        `(scale, zero_point)`, float32, shaped like `low`.
    """
    scale = (torch.maximum(-low, high) * (HEADROOM / largest)).clamp_min(_FLOOR)
    return scale.float(), torch.zeros_like(scale, dtype=torch.float32)


class FloatQuantizer(ActivationQuantizer):
    """Quantise an input to E4M3 with the scale of its denoising step.

    Args:
        table: the T calibrated timesteps.

    Attributes:
        scale: parameter `[T]`, the scales `s`.
        zero_point: parameter `[T]` that stays 0.
    """

    def __init__(self, table: TimestepTable) -> None:
        super().__init__(8, table, "frozen", symmetric=True)

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x[B, ...] -> the nearest representable values; see `ActivationQuantizer.forward`."""
        if step is None:
            step = current_step()
            if step is None:
                return x
        return self._rounded(x, per_item(select_step(self.scale, step, len(x)), x))

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_e4m3(x, scale, reciprocal=True)

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the calibrated `scale[T]`; there is no zero point."""
        self.scale.copy_(scale)

    def integer_bounds(self) -> tuple[Tensor, Tensor]:
        """Raise, since the codes are no integers.

        Raises:
            QuantizationError: always.
        """
        raise QuantizationError("a layer in FP8 or NVFP4 has no integer codes")


@dataclass(frozen=True, eq=False)
class FloatActivation(ActivationTensors):
    """Tensors of an input quantiser whose codes are floating-point numbers; see `ActivationTensors`.

    `low` and `high` are the smallest and the largest code, float32 `[T]`.
    """

    @classmethod
    def of_scale(cls, scale: Tensor, bits: int, largest: float) -> FloatActivation:
        """The tensors of a quantiser with these scales, float32 `[T]`."""
        limit = torch.full(scale.shape, largest, dtype=torch.float32)
        return cls(scale, scale.reciprocal(), -limit, limit, bits)

    def tensors(self, operand: str) -> dict[str, Tensor]:
        """The quantiser's entries in `quantized.safetensors`."""
        return {f"{operand}.scale": self.scale, f"{operand}.inv_scale": self.inv_scale}


@dataclass(frozen=True, eq=False)
class Fp8Weight(PackedWeight):
    """A weight in E4M3: `w[o] ~ values[o] * scale[o]`.

    Attributes:
        codes: bit patterns, uint8 `[N, K, ...]`.
        scale: scales, float32 `[N, 1, ...]`.
        zero_point: zeros, shaped like the scales.
        bits: 8.
    """

    def values(self) -> Tensor:
        """The E4M3 numbers, float32 `[N, K, ...]`."""
        return self.codes.view(torch.float8_e4m3fn).float()

    def integers(self) -> Tensor:
        """Raise, since the codes are no integers.

        Raises:
            QuantizationError: always.
        """
        raise QuantizationError("a weight in FP8 has no integer codes")

    def dequantize(self) -> Tensor:
        """The float32[N, K, ...] values that the codes represent."""
        return self.values() * self.scale


class _Fp8(QuantLayer):
    """A layer whose weight and input are quantised to E4M3; see `QuantLayer` for the arguments."""

    def _make_activation(
        self, bits: int, table: TimestepTable, mode: ZeroPointMode
    ) -> ActivationQuantizer:
        return FloatQuantizer(table)

    def _weight_range(self, method: Method) -> tuple[Tensor, Tensor]:
        if self.base == "int":
            raise QuantizationError('adapters with base "int" need integer codes; use base "fp"')
        weight = self.weight.detach().float()
        largest = weight.abs().flatten(1).amax(1).reshape(-1, *(1,) * (weight.ndim - 1))
        return float_range(-largest, largest)

    def weight_level(self) -> float:
        """Distance of neighbouring codes at weights of usual size, in units of the weight."""
        return _LEVELS * float(self.weight_scale.detach().mean())

    def quantized_weight(self) -> Tensor:
        """The nearest representable values of the updated weight, differentiable."""
        return fake_e4m3(self.updated_weight(), self.weight_scale)

    @torch.no_grad()
    def merge(self) -> Fp8Weight:
        """The weight that `forward` uses, with the adapters merged.

        Raises:
            NonFiniteError: the updated weight or its scale holds NaN or infinity.
        """
        weight, scale = self.updated_weight(), self.weight_scale.detach().clone()
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the fine-tuned weight holds NaN or infinity")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise NonFiniteError("the weight scale is not a positive finite number")
        codes = (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return Fp8Weight.of(codes.view(torch.uint8), scale, torch.zeros_like(scale), 8)


class _Fp8Linear(_Fp8, QuantLinear):
    pass


class _Fp8Conv1d(_Fp8, QuantConv1d):
    pass


class _Fp8Conv2d(_Fp8, QuantConv2d):
    pass


class _Fp8Conv3d(_Fp8, QuantConv3d):
    pass


FP8_LAYERS: dict[str, type[_Fp8]] = {
    "linear": _Fp8Linear,
    "conv1d": _Fp8Conv1d,
    "conv2d": _Fp8Conv2d,
    "conv3d": _Fp8Conv3d,
}
"""The quantised class of each kind of layer with a weight."""


@dataclass(frozen=True, eq=False)
class Fp8Tensors:
    """Tensors of one deployed FP8 layer.

    Attributes:
        weight: weight, `[N, K, ...]`.
        activation: scales of the input.
        bias: float32 `[N]`; None: no bias.
        transform: transform of the input; None: the input is not transformed.
    """

    weight: Fp8Weight
    activation: FloatActivation
    bias: Tensor | None
    transform: TransformTensors | None = None

    precision = "fp8"

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"activation": self.activation}

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> Fp8Tensors:
        """Tensors of a trained layer, with its adapters merged.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
        """
        weight = layer.merge()
        assert isinstance(weight, Fp8Weight)
        activation = FloatActivation.of_scale(merged_scale(layer.activation), 8, FP8_MAX)
        return cls(weight, activation, merged_bias(layer))

    def tensors(self) -> dict[str, Tensor]:
        """The layer's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        named = {
            "weight.codes": self.weight.codes,
            "weight.scale": self.weight.scale.contiguous(),
            **self.activation.tensors("activation"),
            **transform_entries(self.transform),
        }
        return named if self.bias is None else named | {"bias": self.bias}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor], *, shape: torch.Size) -> Fp8Tensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            shape: shape of the float weight, `[N, K, ...]`.

        Raises:
            ArtefactError: a tensor is missing, or does not fit the layer.
        """
        channels, *rest = shape
        codes = checked_tensor(named, "weight.codes", tuple(shape), torch.uint8)
        one_each = (channels, *(1,) * len(rest))
        scale = checked_tensor(named, "weight.scale", one_each, torch.float32, positive=True)
        bias = named.get("bias")
        return cls(
            Fp8Weight.of(codes, scale, torch.zeros_like(scale), 8),
            FloatActivation.of_scale(named["activation.scale"], 8, FP8_MAX),
            None if bias is None else bias.float(),
        )


class DeployedFp8(ExactBuffers, WeightlessLayer):
    """An FP8 linear layer or convolution; the reference for every engine.

    Args:
        tensors: tensors of the layer.
        geometry: geometry of a convolution; None for a linear layer.
    """

    bias: Tensor | None
    weight_scale: Tensor
    codes: Tensor
    scale: Tensor
    inv_scale: Tensor

    def __init__(self, tensors: Fp8Tensors, geometry: ConvGeometry | None) -> None:
        super().__init__(tensors.weight.shape, geometry)
        self.geometry = geometry
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", tensors.weight.scale.reshape(-1))
        self.register_buffer("codes", tensors.weight.codes)
        self.register_buffer("scale", tensors.activation.scale)
        self.register_buffer("inv_scale", tensors.activation.inv_scale)

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """input[B, ...] -> the layer's output, with the dtype of the input.

        Args:
            input: input, with the rows of `step` first; named as in `nn.Linear`.
            step: index of the denoising step, one for all rows or one per row; None: the step of the
                enclosing `step_scope`.

        Raises:
            StepError: there is no current step, or the step is outside the table.
        """
        step = enclosing_step(step)
        scale, inv_scale = (
            per_item(select_step(values, step, len(input)), input)
            for values in (self.scale, self.inv_scale)
        )
        x = e4m3(input.float() * inv_scale)
        weight = self.codes.view(torch.float8_e4m3fn).float()
        if self.geometry is None:
            channel: tuple[int, ...] = (-1,)
            product = nn.functional.linear(x, weight)
        else:
            channel = (-1, *(1,) * self.geometry.axes)
            product = self.geometry.convolve(x, weight, None)
        out: Tensor = product * (self.weight_scale.reshape(channel) * scale)
        if self.bias is not None:
            out = out + self.bias.reshape(channel)
        return out.to(input.dtype)
