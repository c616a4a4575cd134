"""Layers as they ship: integer weights, integer activation codes, one table of scales per step.

    k = clip(round(x * inv_s[t]), lo[t], hi[t])
    y = op(k, q - z) * d * s[t] + bias

This is the arithmetic of the exported graph, operation by operation. The product is taken of whole
numbers and scaled afterwards: below 2^24 float32 adds them without rounding, in whatever order, so a
runtime that computes it in float gets the same bits as one that computes it in integers. With the
weight scaled first, sums differ in their last bits, values near a rounding tie fall on the other
code, and a 4-bit network carries one such flip through to its output.

Letters: N, K out / in features or channels, T steps, B images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.quant.activation import per_item, select_step
from trtq.quant.modules import ConvGeometry, QuantLayer
from trtq.quant.packing import PackedWeight, unpack_codes
from trtq.quant.timestep import Step, current_step

__all__ = ["DeployedGroupNorm", "DeployedLayer", "LayerTensors"]


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """The numbers of one deployed layer.

    Attributes:
        weight: the integer weight, `[N, K, ...]`.
        scale: float32 `[T]`, value of one activation code at each step.
        inv_scale: float32 `[T]`, the stored reciprocal of `scale`.
        low: int32 `[T]`, smallest activation code.
        high: int32 `[T]`, largest activation code.
        bias: float32 `[N]`, or None.
        activation_bits: width of the activation codes.
    """

    weight: PackedWeight
    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor
    bias: Tensor | None
    activation_bits: int

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> LayerTensors:
        """Fold a trained layer into integers; trained float zero points are rounded here.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
            QuantizationError: the codes do not fit int8.
        """
        weight = layer.merge()
        scale = layer.activation.scale.detach().clone()
        low, high = layer.activation.integer_bounds()
        bias = None if layer.bias is None else layer.bias.detach().float()
        for name, tensor in (("weight scale", weight.scale), ("activation scale", scale)):
            if not bool(torch.isfinite(tensor).all()) or bool((tensor <= 0).any()):
                raise NonFiniteError(f"the {name} is not a positive finite number")
        if int(low.min()) < -128 or int(high.max()) > 127:
            raise QuantizationError(
                f"{layer.activation.bits}-bit activation codes span {int(low.min())} .. "
                f"{int(high.max())}, which int8 cannot hold; 8-bit activations must be symmetric"
            )
        weight.integers()
        bits = layer.activation.bits
        return cls(weight, scale, scale.reciprocal(), low, high, bias, bits)

    def tensors(self) -> dict[str, Tensor]:
        """What `quantized.safetensors` holds of the layer; `from_tensors` is the inverse."""
        named = {
            "weight.codes": self.weight.pack(),
            "weight.scale": self.weight.scale.contiguous(),
            "weight.zero_point": self.weight.zero_point.to(torch.int16),
            "activation.scale": self.scale,
            "activation.inv_scale": self.inv_scale,
            "activation.low": self.low.to(torch.int16),
            "activation.high": self.high.to(torch.int16),
        }
        return named if self.bias is None else named | {"bias": self.bias}

    @classmethod
    def from_tensors(
        cls, named: Mapping[str, Tensor], *, channels: int, weight_bits: int, activation_bits: int
    ) -> LayerTensors:
        """Read back what `tensors` gave.

        Raises:
            ArtefactError: a tensor is missing or has the wrong size.
        """
        try:
            weight = PackedWeight(
                unpack_codes(named["weight.codes"], weight_bits, channels),
                named["weight.scale"],
                named["weight.zero_point"].float(),
                weight_bits,
            )
            bias = named.get("bias")
            return cls(
                weight,
                named["activation.scale"],
                named["activation.inv_scale"],
                named["activation.low"].int(),
                named["activation.high"].int(),
                None if bias is None else bias.float(),
                activation_bits,
            )
        except KeyError as err:
            raise ArtefactError(f"the tensor {err.args[0]!r} is missing") from err


class DeployedLayer(nn.Module):
    """A linear or 2-D convolution computed from its integers; the reference of every engine.

    Args:
        tensors: its numbers.
        geometry: of the convolution; None for a linear layer.
    """

    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor
    bias: Tensor | None
    weight_scale: Tensor
    integers: Tensor

    def __init__(self, tensors: LayerTensors, geometry: ConvGeometry | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("scale", tensors.scale)
        self.register_buffer("inv_scale", tensors.inv_scale)
        self.register_buffer("low", tensors.low.float())
        self.register_buffer("high", tensors.high.float())
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", tensors.weight.scale.reshape(-1))
        self.register_buffer("integers", tensors.weight.integers().float())

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x[B, ...] -> the layer's output, same dtype.

        Args:
            x: input, batch first.
            step: index of the denoising step; by default that of the enclosing `step_scope`.

        Raises:
            StepError: no step, or one outside the table.
        """
        if step is None:
            step = current_step()
            if step is None:
                raise QuantizationError(
                    "a deployed layer holds integers only; it has no float form"
                )
        scale, inv_scale, low, high = (
            per_item(select_step(values, step, len(x)), x)
            for values in (self.scale, self.inv_scale, self.low, self.high)
        )
        codes = (x.float() * inv_scale).round().clamp(low, high)
        if self.geometry is None:
            product = functional.linear(codes, self.integers)
        else:
            product = self.geometry.convolve(codes, self.integers, None)
        channel = (-1,) if self.geometry is None else (-1, 1, 1)
        out = product * self.weight_scale.reshape(channel) * scale
        if self.bias is not None:
            out = out + self.bias.reshape(channel)
        return out.to(x.dtype)


class DeployedGroupNorm(nn.Module):
    """`nn.GroupNorm` with mean and deviation summed in float64, as the exported graph has it.

    Rounded to float32 afterwards they no longer depend on the order of the additions, so torch and
    onnxruntime hand the same bits to the quantiser that follows.

    Args:
        source: the layer; its parameters are shared.
    """

    def __init__(self, source: nn.GroupNorm) -> None:
        super().__init__()
        self.weight = source.weight
        self.bias = source.bias
        self.groups = source.num_groups
        # ONNX keeps epsilon in float32.
        self.epsilon = float(torch.tensor(source.eps, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x[B,C,...] -> the same shape and dtype, normalised over each group of channels."""
        rows = x.float().reshape(len(x), self.groups, -1)
        exact = rows.double()
        mean = exact.mean(2, keepdim=True)
        variance = (exact - mean).square().mean(2, keepdim=True)
        inverse = (variance + self.epsilon).sqrt().reciprocal()
        y = ((rows - mean.float()) * inverse.float()).reshape(x.shape)
        channel = (-1, *(1,) * (x.ndim - 2))
        y = y * self.weight.reshape(channel) + self.bias.reshape(channel)
        return y.to(x.dtype)
