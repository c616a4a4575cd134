"""NVFP4 linear layers: E2M1 numbers in blocks of 16 along the input channels, see `formats.e2m1`.

    y = Q(x / s[t]) Q(w / d)^T * (d * s[t]) + bias

`s[t]` is one scale per denoising step, `d` one per layer. Fine-tuning chooses blocks anew in every
forward pass; gradients pass straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.precision import Method
from trtq.quant.activation import ActivationQuantizer, ZeroPointMode, per_item, select_step
from trtq.quant.deployed import ExactBuffers, enclosing_step
from trtq.quant.formats.e2m1 import (
    BLOCK,
    E2M1,
    LIMIT,
    UNIT,
    WEIGHT_LIMIT,
    input_numbers,
    weight_blocks,
)
from trtq.quant.formats.files import checked_tensor
from trtq.quant.formats.fp8 import (
    FloatActivation,
    FloatQuantizer,
    float_range,
)
from trtq.quant.input_transform import TransformTensors, transform_entries
from trtq.quant.layers import QuantLinear
from trtq.quant.modules import QuantLayer
from trtq.quant.packed_codes import register_codes
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, merged_bias, merged_scale
from trtq.quant.timestep import Step, TimestepTable
from trtq.quant.weightless import WeightlessLayer

__all__ = [
    "DeployedNvfp4",
    "Nvfp4Linear",
    "Nvfp4Tensors",
    "Nvfp4Weight",
    "fake_nvfp4",
    "nvfp4_numbers",
]

_SIGN = 8
"""The bit of the sign in a pattern of E2M1."""


def _weight_numbers(u: Tensor) -> Tensor:
    scale, numbers = weight_blocks(u)
    return (numbers * (scale * UNIT)[..., None]).reshape(u.shape)


class _FakeNvfp4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: bool) -> Tensor:
        ratio = x.float() / scale if weight else x.float() * scale.reciprocal()
        ctx.limit = WEIGHT_LIMIT if weight else LIMIT
        if weight:
            numbers = _weight_numbers(ratio.clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT))
        else:
            numbers = input_numbers(x, scale.reciprocal())
        ctx.save_for_backward(ratio, numbers, scale)
        return (numbers * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ratio, numbers, scale = ctx.saved_tensors
        gradient = gradients[0]
        inside = ratio.abs() <= ctx.limit
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient * inside
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, numbers - ratio, numbers)
            grad_scale = (slope * gradient).sum_to_size(scale.shape)
        return grad_x, grad_scale, None


def fake_nvfp4(x: Tensor, scale: Tensor, *, weight: bool) -> Tensor:
    """The nearest representable values of `x[..., K]`, differentiable in both arguments.

    Args:
        x: input or weight, `[..., K]`, K a multiple of 16.
        scale: scale, broadcastable to `x`.
        weight: whether to round as a weight (Four-over-Six, no half precision in between).
    """
    result: Tensor = _FakeNvfp4.apply(x, scale, weight)  # type: ignore[no-untyped-call]
    return result


class _Nvfp4Quantizer(FloatQuantizer):
    """Quantise an input to NVFP4 with the scale of its denoising step."""

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_nvfp4(x, scale, weight=False)


def nvfp4_numbers(codes: Tensor, block_scale: Tensor) -> Tensor:
    """The numbers that codes stand for, in units of the scale `d`, float32 `[N, K]`.

    Args:
        codes: bit patterns of E2M1, uint8 `[N, K]`, 0 .. 15.
        block_scale: bit patterns of the E4M3 scales of blocks, uint8 `[N, K / 16]`.
    """
    table = torch.tensor([*E2M1, *(-number for number in E2M1)], device=codes.device)
    scales = block_scale.view(torch.float8_e4m3fn).float() * UNIT
    return table[codes.int()] * scales.repeat_interleave(BLOCK, 1)


@dataclass(frozen=True, eq=False)
class Nvfp4Weight(PackedWeight):
    """A weight in NVFP4.

    Attributes:
        codes: bit patterns of E2M1, uint8 `[N, K]`, 0 .. 15.
        scale: the scale `d`, float32 `[1, 1]`.
        zero_point: zero, shaped like the scale.
        bits: 4.
        block_scale: bit patterns of the E4M3 scales of blocks, uint8 `[N, K / 16]`.
    """

    block_scale: Tensor

    def values(self) -> Tensor:
        """The represented numbers in units of `d`, float32 `[N, K]`."""
        return nvfp4_numbers(self.codes, self.block_scale)

    def integers(self) -> Tensor:
        """Raise, since the codes are no integers.

        Raises:
            QuantizationError: always.
        """
        raise QuantizationError("a weight in NVFP4 has no integer codes")

    def dequantize(self) -> Tensor:
        """The float32[N, K] values that the codes represent."""
        return self.values() * self.scale


class Nvfp4Linear(QuantLinear):
    """`nn.Linear` on operands in NVFP4; see `QuantLayer` for the arguments."""

    def _make_activation(
        self, bits: int, table: TimestepTable, mode: ZeroPointMode
    ) -> ActivationQuantizer:
        return _Nvfp4Quantizer(table)

    def _weight_range(self, method: Method) -> tuple[Tensor, Tensor]:
        if self.base == "int":
            raise QuantizationError('adapters with base "int" need integer codes; use base "fp"')
        if self.weight.shape[1] % BLOCK:
            raise QuantizationError(
                f"NVFP4 has blocks of {BLOCK} input channels, which do not divide {self.weight.shape[1]}"
            )
        largest = self.weight.detach().float().abs().amax().reshape(1, 1)
        return float_range(-largest, largest, WEIGHT_LIMIT)

    def weight_level(self) -> float:
        """Mean distance of neighbouring codes below 4, in units of the weight."""
        blocks = self.weight.detach().float().abs().reshape(-1, BLOCK)
        return float(blocks.amax(1).mean()) / E2M1[-1]

    def quantized_weight(self) -> Tensor:
        """The nearest representable values of the updated weight, differentiable."""
        return fake_nvfp4(self.updated_weight(), self.weight_scale, weight=True)

    @torch.no_grad()
    def merge(self) -> Nvfp4Weight:
        """The weight that `forward` uses, with the adapters merged.

        Raises:
            NonFiniteError: the updated weight or its scale holds NaN or infinity.
        """
        weight, scale = self.updated_weight(), self.weight_scale.detach().clone()
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the fine-tuned weight holds NaN or infinity")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise NonFiniteError("the weight scale is not a positive finite number")
        block_scale, numbers = weight_blocks(
            (weight.float() / scale).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
        )
        flat = numbers.reshape(weight.shape)
        index = torch.bucketize(flat.abs(), torch.tensor(E2M1, device=flat.device))
        codes = (index + _SIGN * (flat < 0)).to(torch.uint8)
        patterns = block_scale.to(torch.float8_e4m3fn).view(torch.uint8)
        return Nvfp4Weight.of(codes, scale, torch.zeros_like(scale), 4, block_scale=patterns)


@dataclass(frozen=True, eq=False)
class Nvfp4Tensors:
    """Tensors of one deployed NVFP4 layer.

    Attributes:
        weight: weight, `[N, K]`.
        activation: scales of the input.
        bias: float32 `[N]`; None: no bias.
        transform: transform of the input; None: the input is not transformed.
    """

    weight: Nvfp4Weight
    activation: FloatActivation
    bias: Tensor | None
    transform: TransformTensors | None = None

    precision = "nvfp4"

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"activation": self.activation}

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> Nvfp4Tensors:
        """Tensors of a trained layer, with its adapters merged.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
        """
        weight = layer.merge()
        assert isinstance(weight, Nvfp4Weight)
        activation = FloatActivation.of_scale(merged_scale(layer.activation), 4, LIMIT)
        return cls(weight, activation, merged_bias(layer))

    def tensors(self) -> dict[str, Tensor]:
        """The layer's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        named = {
            "weight.codes": self.weight.packed,
            "weight.block_scale": self.weight.block_scale.contiguous(),
            "weight.scale": self.weight.scale.contiguous(),
            **self.activation.tensors("activation"),
            **transform_entries(self.transform),
        }
        return named if self.bias is None else named | {"bias": self.bias}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor], *, shape: torch.Size) -> Nvfp4Tensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            shape: shape of the float weight, `[N, K]`.

        Raises:
            ArtefactError: a tensor is missing, or does not fit the layer.
        """
        channels, width = shape
        if width % BLOCK:
            raise ArtefactError(f"blocks of {BLOCK} do not divide {width} input channels")
        codes = checked_tensor(named, "weight.codes", (-(-channels // 2), width), torch.uint8)
        blocks = checked_tensor(
            named, "weight.block_scale", (channels, width // BLOCK), torch.uint8
        )
        numbers = blocks.view(torch.float8_e4m3fn).float()
        if not bool((torch.isfinite(numbers) & (numbers >= 0)).all()):
            raise ArtefactError(
                "the tensor 'weight.block_scale' must hold finite numbers, 0 or more"
            )
        scale = checked_tensor(named, "weight.scale", (1, 1), torch.float32, positive=True)
        weight = Nvfp4Weight(codes, scale, torch.zeros_like(scale), 4, channels, blocks)
        bias = named.get("bias")
        return cls(
            weight,
            FloatActivation.of_scale(named["activation.scale"], 4, LIMIT),
            None if bias is None else bias.float(),
        )


class DeployedNvfp4(ExactBuffers, WeightlessLayer):
    """An NVFP4 linear layer; the reference for every engine.

    Args:
        tensors: tensors of the layer.
        packed: whether the codes are unpacked in each call, see `trtq.quant.packed_codes`.
    """

    bias: Tensor | None
    weight_scale: Tensor
    codes: Tensor
    block_scale: Tensor
    scale: Tensor
    inv_scale: Tensor
    geometry = None

    def __init__(self, tensors: Nvfp4Tensors, *, packed: bool = False) -> None:
        weight = tensors.weight
        super().__init__(weight.shape, None)
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", weight.scale)
        register_codes(
            self, "codes", lambda: weight.codes, weight.shape, torch.uint8, packed=packed
        )
        self.register_buffer("block_scale", weight.block_scale)
        self.register_buffer("scale", tensors.activation.scale)
        self.register_buffer("inv_scale", tensors.activation.inv_scale)

    def forward(self, input: Tensor, step: Step | None = None) -> Tensor:
        """input[B, ..., K] -> [B, ..., N], with the dtype of the input.

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
        weight = nvfp4_numbers(self.codes, self.block_scale)
        product = nn.functional.linear(input_numbers(input, inv_scale), weight)
        # The graph multiplies by one value per channel, all equal.
        out: Tensor = product * (self.weight_scale.reshape(-1) * scale)
        if self.bias is not None:
            out = out + self.bias
        return out.to(input.dtype)
