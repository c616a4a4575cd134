"""Tensors of deployed layers: integer weights, tables of scales, and their names in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.precision import ScalePolicy
from trtq.quant.activation import ActivationQuantizer
from trtq.quant.input_transform import TransformTensors, transform_entries
from trtq.quant.modules import QuantLayer
from trtq.quant.packing import PackedWeight, checked_stream
from trtq.quant.product import QuantProduct

__all__ = [
    "ActivationTensors",
    "LayerTensors",
    "ProductTensors",
    "merged_bias",
    "merged_scale",
]


def merged_scale(quantizer: ActivationQuantizer) -> Tensor:
    """The trained scales `[T]` of a quantiser.

    Raises:
        NonFiniteError: a scale is not a positive finite number.
    """
    scale = quantizer.scale.detach().clone()
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        raise NonFiniteError("the activation scale is not a positive finite number")
    return scale


def merged_bias(layer: QuantLayer) -> Tensor | None:
    """The trained bias of a layer, float32 `[N]`; None: the layer has none.

    Raises:
        NonFiniteError: the bias holds NaN or infinity.
    """
    bias = layer.updated_bias()
    if bias is None:
        return None
    if not bool(torch.isfinite(bias).all()):
        raise NonFiniteError("the bias holds NaN or infinity")
    return bias.detach().float().clone()


@dataclass(frozen=True, eq=False)
class ActivationTensors:
    """Tensors of one deployed activation quantiser.

    Attributes:
        scale: float32 `[T]`, value of one code unit at each step.
        inv_scale: float32 `[T]`, the stored reciprocal of `scale`.
        low: int32 `[T]`, smallest code.
        high: int32 `[T]`, largest code.
        bits: width of the codes.
        policy: origin of the scale, see `trtq.quant.dynamic_scale`; `row` does not use the tables.
    """

    scale: Tensor
    inv_scale: Tensor
    low: Tensor
    high: Tensor
    bits: int
    policy: ScalePolicy = "step"

    @classmethod
    def merge(cls, quantizer: ActivationQuantizer) -> ActivationTensors:
        """Tensors of a trained quantiser; trained float zero points are rounded here.

        Raises:
            NonFiniteError: a scale is not a positive finite number.
            QuantizationError: the codes do not fit int8.
        """
        scale = merged_scale(quantizer)
        low, high = quantizer.integer_bounds()
        if int(low.min()) < -128 or int(high.max()) > 127:
            raise QuantizationError(
                f"{quantizer.bits}-bit activation codes span {int(low.min())} .. "
                f"{int(high.max())}, which int8 cannot hold; 8-bit activations must be symmetric"
            )
        return cls(scale, scale.reciprocal(), low, high, quantizer.bits, quantizer.policy)

    def tensors(self, operand: str) -> dict[str, Tensor]:
        """The quantiser's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        return {
            f"{operand}.scale": self.scale,
            f"{operand}.inv_scale": self.inv_scale,
            f"{operand}.low": self.low.to(torch.int16),
            f"{operand}.high": self.high.to(torch.int16),
        }

    @classmethod
    def from_tensors(
        cls, named: Mapping[str, Tensor], operand: str, bits: int, policy: ScalePolicy = "step"
    ) -> ActivationTensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            operand: name of the quantised input.
            bits: width of the codes.
            policy: origin of the scale.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(
            named[f"{operand}.scale"],
            named[f"{operand}.inv_scale"],
            named[f"{operand}.low"].int(),
            named[f"{operand}.high"].int(),
            bits,
            policy,
        )


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """Tensors of one deployed linear layer or convolution.

    Attributes:
        weight: integer weight, `[N, K, ...]`.
        activation: quantiser of the input.
        bias: float32 `[N]`; None: no bias.
        transform: transform of the input before its quantiser; None: the input is not transformed.
    """

    weight: PackedWeight
    activation: ActivationTensors
    bias: Tensor | None
    transform: TransformTensors | None = None

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"activation": self.activation}

    @classmethod
    @torch.no_grad()
    def merge(cls, layer: QuantLayer) -> LayerTensors:
        """Integers of a trained layer, with its adapters merged.

        Raises:
            NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
            QuantizationError: the codes do not fit int8.
        """
        weight = layer.merge()
        if not bool(torch.isfinite(weight.scale).all()) or bool((weight.scale <= 0).any()):
            raise NonFiniteError("the weight scale is not a positive finite number")
        bias = merged_bias(layer)
        weight.integers()
        activation = ActivationTensors.merge(layer.activation)
        transform = None if layer.input_transform is None else layer.input_transform.tensors
        return cls(weight, activation, bias, transform)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        named = {
            "weight.codes": self.weight.packed,
            "weight.scale": self.weight.scale.contiguous(),
            "weight.zero_point": self.weight.zero_point.to(torch.int16),
            **self.activation.tensors("activation"),
            **transform_entries(self.transform),
        }
        return named if self.bias is None else named | {"bias": self.bias}

    @classmethod
    def from_tensors(
        cls,
        named: Mapping[str, Tensor],
        *,
        channels: int,
        weight_bits: int,
        activation_bits: int,
        policy: ScalePolicy = "step",
    ) -> LayerTensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            channels: number of output channels.
            weight_bits: width of the weight codes.
            activation_bits: width of the activation codes.
            policy: origin of the activation's scale.

        Raises:
            ArtefactError: a tensor is missing or has the wrong size.
        """
        try:
            weight = PackedWeight(
                checked_stream(named["weight.codes"], weight_bits, channels),
                named["weight.scale"],
                named["weight.zero_point"].float(),
                weight_bits,
                channels,
            )
            bias = named.get("bias")
            return cls(
                weight,
                ActivationTensors.from_tensors(named, "activation", activation_bits, policy),
                None if bias is None else bias.float(),
                TransformTensors.from_tensors(named),
            )
        except KeyError as err:
            raise ArtefactError(f"the tensor {err.args[0]!r} is missing") from err


@dataclass(frozen=True, eq=False)
class ProductTensors:
    """Tensors of one deployed product of two activations.

    Attributes:
        left: quantiser of the first operand.
        right: quantiser of the second operand.
        transform: factors of the operands' channels that the weights around the product contain, see
            `trtq.quant.attention_channels`; None: unchanged. The product does not use them.
    """

    left: ActivationTensors
    right: ActivationTensors
    transform: TransformTensors | None = None

    @property
    def operands(self) -> dict[str, ActivationTensors]:
        """The quantised inputs by name."""
        return {"left": self.left, "right": self.right}

    @classmethod
    @torch.no_grad()
    def merge(cls, product: QuantProduct) -> ProductTensors:
        """Tensors of a trained product; errors are those of `ActivationTensors.merge`."""
        left, right = (ActivationTensors.merge(each) for each in (product.left, product.right))
        return cls(left, right, product.transform)

    def tensors(self) -> dict[str, Tensor]:
        """The product's entries in `quantized.safetensors`; `from_tensors` is the inverse."""
        tables = self.left.tensors("left") | self.right.tensors("right")
        return tables | transform_entries(self.transform)

    @classmethod
    def from_tensors(
        cls,
        named: Mapping[str, Tensor],
        *,
        left_bits: int,
        right_bits: int,
        policy: ScalePolicy = "step",
    ) -> ProductTensors:
        """Inverse of `tensors`.

        Args:
            named: tensors by name.
            left_bits: width of the first operand's codes.
            right_bits: width of the second operand's codes.
            policy: origin of the scales.

        Raises:
            ArtefactError: a tensor is missing.
        """
        try:
            return cls(
                ActivationTensors.from_tensors(named, "left", left_bits, policy),
                ActivationTensors.from_tensors(named, "right", right_bits, policy),
                TransformTensors.from_tensors(named),
            )
        except KeyError as err:
            raise ArtefactError(f"the tensor {err.args[0]!r} is missing") from err
