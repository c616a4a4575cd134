"""Plan of a quantised denoiser: the kind, the bits and the reason of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trtq.errors import TrtqError
from trtq.precision import Format, ScalePolicy, precision_text
from trtq.quant.formats import FormatTensors
from trtq.quant.geometry import padding_obstacle
from trtq.quant.structure import Product
from trtq.quant.tensors import LayerTensors, ProductTensors

__all__ = [
    "Kind",
    "LayerPlan",
    "LowBitTensors",
    "layer_kind",
    "layer_obstacle",
    "named_errors",
    "precision_text",
    "quantizable_layers",
    "transform_key",
]

LowBitTensors = LayerTensors | ProductTensors | FormatTensors
"""Tensors of a deployed layer: linear and convolution, or product of two activations."""

Kind = Literal["linear", "conv1d", "conv2d", "conv3d", "conv_transpose", "product"]
"""Kinds of layers. Transposed convolutions are listed, and stay float."""

_CLASSES: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.ConvTranspose1d, "conv_transpose"),
    (nn.ConvTranspose2d, "conv_transpose"),
    (nn.ConvTranspose3d, "conv_transpose"),
    (Product, "product"),
)


@dataclass(frozen=True)
class LayerPlan:
    """Plan of one linear layer, convolution or product of activations.

    Attributes:
        name: module path of the layer in the denoiser.
        kind: kind of the layer, see `Kind`.
        weight_bits: width of the weight codes; None: a product, or a layer that stays float.
        activation_bits: width of the codes of the (first) input; None: a layer that stays float.
        reason: reason for the choice, in a few words.
        adapters: whether fine-tuning adds QALoRA adapters to the layer.
        right_bits: width of the codes of a product's second input; None: not a product.
        input_of: path of an earlier layer with the same input, whose input quantiser this layer shares;
            None: the layer has its own.
        smooth: whether the channels of the input are scaled before the quantiser; those of a product
            by the weights around it, see `trtq.quant.attention_channels`.
        rotate: number of channels that a rotation of the input mixes; 0: no rotation.
        scales: origin of the activations' scales, see `trtq.quant.dynamic_scale`.
        free_scales: whether calibration chooses the origin of the scales.
        outlier_ratio: largest channel of the input over the median channel, mean over the steps; None:
            not measured.
        may_smooth: whether the policy allows smoothing.
        may_rotate: maximum order of a rotation by the policy; None: that of the recipe.
        format: format of the layer, see `trtq.quant.formats.Format`. A weight-only layer has 16
            activation bits, since its input is not quantised.
        group: number of input channels that share a scale of a weight-only linear layer; None: one
            scale per output channel.
    """

    name: str
    kind: Kind
    weight_bits: int | None
    activation_bits: int | None
    reason: str
    adapters: bool = True
    right_bits: int | None = None
    input_of: str | None = None
    smooth: bool = False
    rotate: int = 0
    scales: ScalePolicy = "step"
    free_scales: bool = False
    outlier_ratio: float | None = None
    may_smooth: bool = True
    may_rotate: int | None = None
    format: Format = "int"
    group: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer becomes low-bit."""
        return self.activation_bits is not None

    @property
    def precision(self) -> str:
        """Bits or format as text, see `trtq.precision.precision_text`."""
        bits = self.weight_bits, self.activation_bits, self.right_bits
        return precision_text(*bits, self.format)

    @property
    def operands(self) -> dict[str, int]:
        """Bits of each quantised input, by the name of the input's quantiser within the layer."""
        if self.activation_bits is None or self.format == "weight_only":
            return {}
        if self.right_bits is None:
            return {"activation": self.activation_bits}
        return {"left": self.activation_bits, "right": self.right_bits}


def transform_key(layer: LowBitTensors) -> bytes:
    """Bytes that are equal for layers with equal transforms of their input; empty: no transform."""
    transform = None if isinstance(layer, ProductTensors) else layer.transform
    return b"" if transform is None else transform.key


def layer_kind(module: nn.Module) -> Kind | None:
    """Kind of a float module as a layer; None for a module that is no layer."""
    return next((kind for known, kind in _CLASSES if isinstance(module, known)), None)


def layer_obstacle(module: nn.Module) -> str | None:
    """The reason why a layer cannot be low-bit; None if it can.

    Args:
        module: module with a kind, see `layer_kind`.
    """
    known, kind = next(pair for pair in _CLASSES if isinstance(module, pair[0]))
    if kind == "conv_transpose":
        return "a transposed convolution has no integer form"
    if type(module).forward is not known.forward:
        return f"{type(module).__name__} computes its output in its own way"
    return padding_obstacle(module) if kind.startswith("conv") else None


def quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, convolution and `Product` by its module path, in module order.

    Some of these layers must stay float, see `layer_obstacle`.
    """
    return {
        name: module for name, module in denoiser.named_modules() if layer_kind(module) is not None
    }


@contextmanager
def named_errors(layer: str) -> Iterator[None]:
    """Prefix errors raised inside the block with the layer's name."""
    try:
        yield
    except TrtqError as err:
        raise type(err)(f"layer {layer!r}: {err}") from err
