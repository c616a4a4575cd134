"""Layers as they ship: integer weights, integer activation codes, one table of scales per step.

    k = clip(round(x * inv_s[t]), lo[t], hi[t])
    y = op(k, q - z) * (d * s[t]) + bias

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
from trtq.quant.activation import ActivationQuantizer, per_item, select_step
from trtq.quant.modules import ConvGeometry, QuantLayer, QuantProduct
from trtq.quant.packing import PackedWeight, unpack_codes
from trtq.quant.timestep import Step, current_step

__all__ = [
    "ActivationTensors",
    "DeployedLayer",
    "DeployedProduct",
    "LayerTensors",
    "ProductTensors",
    "enclosing_step",
]


@dataclass(frozen=True, eq=False)
class ActivationTensors:
    """The numbers of one deployed activation quantiser.

    Attributes:
        scale: float32 `[T]`, value of one code at each step.
        inv_scale: float32 `[T]`, the stored reciprocal of `scale`.
        low: int32 `[T]`, smallest code.
        high: int32 `[T]`, largest code.
        bits: width of the codes.
    """

    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor
    bits: int

    @classmethod
    def merge(cls, quantizer: ActivationQuantizer) -> ActivationTensors:
        """Read a trained quantiser; trained float zero points are rounded here.

        Raises:
            NonFiniteError: a scale is not a positive finite number.
            QuantizationError: the codes do not fit int8.
        """
        scale = quantizer.scale.detach().clone()
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise NonFiniteError("the activation scale is not a positive finite number")
        low, high = quantizer.integer_bounds()
        if int(low.min()) < -128 or int(high.max()) > 127:
            raise QuantizationError(
                f"{quantizer.bits}-bit activation codes span {int(low.min())} .. "
                f"{int(high.max())}, which int8 cannot hold; 8-bit activations must be symmetric"
            )
        return cls(scale, scale.reciprocal(), low, high, quantizer.bits)

    def tensors(self, operand: str) -> dict[str, Tensor]:
        """What `quantized.safetensors` holds of the quantiser; `from_tensors` is the inverse."""
        return {
            f"{operand}.scale": self.scale,
            f"{operand}.inv_scale": self.inv_scale,
            f"{operand}.low": self.low.to(torch.int16),
            f"{operand}.high": self.high.to(torch.int16),
        }

    @classmethod
    def from_tensors(
        cls, named: Mapping[str, Tensor], operand: str, bits: int
    ) -> ActivationTensors:
        """Read back what `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(
            named[f"{operand}.scale"],
            named[f"{operand}.inv_scale"],
            named[f"{operand}.low"].int(),
            named[f"{operand}.high"].int(),
            bits,
        )


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """The numbers of one deployed linear or convolution.

    Attributes:
        weight: the integer weight, `[N, K, ...]`.
        activation: the quantiser of its input.
        bias: float32 `[N]`, or None.
    """

    weight: PackedWeight
    activation: ActivationTensors
    bias: Tensor | None

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"activation": self.activation}

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> LayerTensors:
        """Fold a trained layer into integers.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
            QuantizationError: the codes do not fit int8.
        """
        weight = layer.merge()
        if not bool(torch.isfinite(weight.scale).all()) or bool((weight.scale <= 0).any()):
            raise NonFiniteError("the weight scale is not a positive finite number")
        bias = layer.updated_bias()
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise NonFiniteError("the bias holds NaN or infinity")
        weight.integers()
        activation = ActivationTensors.merge(layer.activation)
        return cls(weight, activation, None if bias is None else bias.detach().float().clone())

    def tensors(self) -> dict[str, Tensor]:
        """What `quantized.safetensors` holds of the layer; `from_tensors` is the inverse."""
        named = {
            "weight.codes": self.weight.pack(),
            "weight.scale": self.weight.scale.contiguous(),
            "weight.zero_point": self.weight.zero_point.to(torch.int16),
            **self.activation.tensors("activation"),
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
                ActivationTensors.from_tensors(named, "activation", activation_bits),
                None if bias is None else bias.float(),
            )
        except KeyError as err:
            raise ArtefactError(f"the tensor {err.args[0]!r} is missing") from err


@dataclass(frozen=True, eq=False)
class ProductTensors:
    """The numbers of one deployed product of two activations.

    Attributes:
        left: the quantiser of its first operand.
        right: the quantiser of its second operand.
    """

    left: ActivationTensors
    right: ActivationTensors

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"left": self.left, "right": self.right}

    @classmethod
    @torch.no_grad()
    def merge(cls, product: QuantProduct) -> ProductTensors:
        """Read a trained product; errors are those of `ActivationTensors.merge`."""
        return cls(ActivationTensors.merge(product.left), ActivationTensors.merge(product.right))

    def tensors(self) -> dict[str, Tensor]:
        """What `quantized.safetensors` holds of the product; `from_tensors` is the inverse."""
        return self.left.tensors("left") | self.right.tensors("right")

    @classmethod
    def from_tensors(
        cls, named: Mapping[str, Tensor], *, left_bits: int, right_bits: int
    ) -> ProductTensors:
        """Read back what `tensors` gave.

        Raises:
            ArtefactError: a tensor is missing.
        """
        try:
            return cls(
                ActivationTensors.from_tensors(named, "left", left_bits),
                ActivationTensors.from_tensors(named, "right", right_bits),
            )
        except KeyError as err:
            raise ArtefactError(f"the tensor {err.args[0]!r} is missing") from err


class _DeployedActivation(nn.Module):
    """`x -> (k, s)`: whole-number codes, and the value of one code, for a step."""

    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, tensors: ActivationTensors) -> None:
        super().__init__()
        self.register_buffer("scale", tensors.scale)
        self.register_buffer("inv_scale", tensors.inv_scale)
        self.register_buffer("low", tensors.low.float())
        self.register_buffer("high", tensors.high.float())

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x[B, ...] -> codes[B, ...] and scale, `[]` or one per item; both float32."""
        scale, inv_scale, low, high = (
            per_item(select_step(values, step, len(x)), x)
            for values in (self.scale, self.inv_scale, self.low, self.high)
        )
        return (x.float() * inv_scale).round().clamp(low, high), scale


def enclosing_step(step: Step | None) -> Step:
    """`step`, or that of the enclosing scope.

    Raises:
        StepError: there is none.
        QuantizationError: inside `float_scope`.
    """
    if step is None:
        step = current_step()
        if step is None:
            raise QuantizationError("a deployed layer holds integers only; it has no float form")
    return step


class DeployedLayer(nn.Module):
    """A linear or 2-D convolution computed from its integers; the reference of every engine.

    Args:
        tensors: its numbers.
        geometry: of the convolution; None for a linear layer.
    """

    bias: Tensor | None
    weight_scale: Tensor
    integers: Tensor

    def __init__(self, tensors: LayerTensors, geometry: ConvGeometry | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.activation = _DeployedActivation(tensors.activation)
        self.register_buffer("bias", tensors.bias)
        self.register_buffer("weight_scale", tensors.weight.scale.reshape(-1))
        self.register_buffer("integers", tensors.weight.integers())

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x[B, ...] -> the layer's output, same dtype.

        Args:
            x: input, batch first.
            step: index of the denoising step; by default that of the enclosing `step_scope`.

        Raises:
            StepError: no step, or one outside the table.
        """
        codes, scale = self.activation(x, enclosing_step(step))
        # A byte per weight is kept; what a float product needs lives only as long as it.
        weight = self.integers.float()
        if self.geometry is None:
            product = functional.linear(codes, weight)
        else:
            product = self.geometry.convolve(codes, weight, None)
        channel = (-1,) if self.geometry is None else (-1, 1, 1)
        # Both scales are small: multiplied first, the large product is gone through once.
        out: Tensor = product * (self.weight_scale.reshape(channel) * scale)
        if self.bias is not None:
            out = out + self.bias.reshape(channel)
        return out.to(x.dtype)


class DeployedProduct(nn.Module):
    """`a @ b` computed from codes: `(k_a @ k_b) * s_a[t] * s_b[t]`.

    Args:
        tensors: its numbers.
    """

    def __init__(self, tensors: ProductTensors) -> None:
        super().__init__()
        self.left = _DeployedActivation(tensors.left)
        self.right = _DeployedActivation(tensors.right)

    def forward(self, a: Tensor, b: Tensor, step: Step | None = None) -> Tensor:
        """a[B, ..., M, K], b[B, ..., K, N] -> [B, ..., M, N]; errors as in `DeployedLayer`."""
        step = enclosing_step(step)
        left, left_scale = self.left(a, step)
        right, right_scale = self.right(b, step)
        out: Tensor = (left @ right) * left_scale * right_scale
        return out.to(a.dtype)
