"""The classes of each format, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.precision import Format
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.quant.formats.e2m1 import LIMIT
from trtq.quant.formats.fp8 import FP8_LAYERS, FP8_MAX, DeployedFp8, Fp8Tensors, float_range
from trtq.quant.formats.nvfp4 import DeployedNvfp4, Nvfp4Linear, Nvfp4Tensors
from trtq.quant.formats.weight_only import (
    WEIGHT_ONLY_LAYERS,
    DeployedWeightOnly,
    WeightOnlyTensors,
)
from trtq.quant.geometry import ConvGeometry
from trtq.quant.input_transform import TransformTensors, apply_transform
from trtq.quant.layers import QUANT_LAYERS
from trtq.quant.modules import QuantLayer
from trtq.quant.tensors import LayerTensors

__all__ = [
    "DEPLOYED_FORMS",
    "QUANTIZED_INPUTS",
    "DeployedFormat",
    "FormatTensors",
    "deployed_form",
    "format_range",
    "layer_class",
    "merged_tensors",
    "stored_tensors",
]

FormatTensors = WeightOnlyTensors | Fp8Tensors | Nvfp4Tensors
"""Tensors of a deployed layer in a format other than integers."""
DeployedFormat = DeployedWeightOnly | DeployedFp8 | DeployedNvfp4
"""Deployed layers in a format other than integers."""
DEPLOYED_FORMS: tuple[type[nn.Module], ...] = (
    DeployedLayer,
    DeployedProduct,
    DeployedWeightOnly,
    DeployedFp8,
    DeployedNvfp4,
)
"""The classes of all deployed layers."""
QUANTIZED_INPUTS: tuple[type[nn.Module], ...] = (
    DeployedLayer,
    DeployedProduct,
    DeployedFp8,
    DeployedNvfp4,
)
"""The classes of deployed layers whose inputs are rounded to codes."""


def layer_class(kind: str, format: Format, group: int | None) -> Any:
    """The callable that makes the training form of a layer, with the arguments of `QuantLayer`.

    Args:
        kind: kind of the layer, a key of `QUANT_LAYERS`.
        format: format of the layer.
        group: see `trtq.quant.formats.weight_only.GroupedWeight`; for other formats without effect.

    Raises:
        QuantizationError: the kind of layer does not have the format.
    """
    if format == "weight_only":
        return partial(WEIGHT_ONLY_LAYERS[kind], group=group)
    if format == "fp8":
        return FP8_LAYERS[kind]
    if format == "nvfp4":
        if kind != "linear":
            raise QuantizationError(f"NVFP4 has linear layers only, not {kind}")
        return Nvfp4Linear
    return QUANT_LAYERS[kind]


def format_range(
    format: Format, low: Tensor, high: Tensor, *, static: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of an input in FP8 or NVFP4, from the extremes at each step.

    Args:
        format: format of the layer.
        low: smallest values, `[T]`.
        high: largest values, `[T]`.
        static: whether to return one entry for all steps.
    """
    if static:
        low, high = low.amin()[None], high.amax()[None]
    return float_range(low, high, LIMIT if format == "nvfp4" else FP8_MAX)


def merged_tensors(layer: QuantLayer) -> LayerTensors | FormatTensors:
    """Tensors of a trained layer, with its adapters merged.

    Raises:
        NonFiniteError: a scale, the bias or a merged weight is NaN or infinite.
        QuantizationError: the codes do not fit int8.
    """
    merged: FormatTensors
    if isinstance(layer, tuple(WEIGHT_ONLY_LAYERS.values())):
        merged = WeightOnlyTensors.merge(layer)
    elif isinstance(layer, tuple(FP8_LAYERS.values())):
        merged = Fp8Tensors.merge(layer)
    elif isinstance(layer, Nvfp4Linear):
        merged = Nvfp4Tensors.merge(layer)
    else:
        return LayerTensors.merge(layer)
    transform = layer.input_transform
    return merged if transform is None else replace(merged, transform=transform.tensors)


def stored_tensors(
    named: Mapping[str, Tensor], format: Format, bits: int, group: int | None, source: Any
) -> FormatTensors:
    """Tensors of a layer in a format other than integers, from a file.

    Args:
        named: the layer's tensors by name.
        format: format of the layer.
        bits: width of the weight codes.
        group: see `layer_class`.
        source: layer of the model with the weight's and bias's shape.

    Raises:
        ArtefactError: a tensor is missing, or does not fit the layer.
        NonFiniteError: the bias holds NaN or infinity.
    """
    bias = named.get("bias")
    needed = None if source.bias is None else tuple(source.bias.shape)
    if needed != (None if bias is None else tuple(bias.shape)):
        raise ArtefactError(
            f"the denoiser's layer has a bias of shape {needed}, the file "
            f"{None if bias is None else tuple(bias.shape)}"
        )
    if bias is not None and not bool(bias.isfinite().all()):
        raise NonFiniteError("the bias holds NaN or infinity")
    shape = source.weight.shape
    stored: FormatTensors
    if format == "weight_only":
        stored = WeightOnlyTensors.from_tensors(named, shape=shape, bits=bits, group=group)
    elif format == "fp8":
        stored = Fp8Tensors.from_tensors(named, shape=shape)
    elif format == "nvfp4":
        stored = Nvfp4Tensors.from_tensors(named, shape=shape)
    else:
        raise ArtefactError(f"the format {format!r} has no tensors of its own")
    transform = TransformTensors.from_tensors(named)
    return stored if transform is None else replace(stored, transform=transform)


def deployed_form(
    tensors: FormatTensors, geometry: ConvGeometry | None, *, packed: bool = False
) -> DeployedFormat:
    """The deployed layer of tensors in a format other than integers.

    Args:
        tensors: tensors of the layer.
        geometry: geometry of a convolution; None for a linear layer.
        packed: whether the codes are unpacked in each call, see `trtq.quant.packed_codes`.
    """
    layer: DeployedFormat
    if isinstance(tensors, Fp8Tensors):
        layer = DeployedFp8(tensors, geometry)
    elif isinstance(tensors, Nvfp4Tensors):
        layer = DeployedNvfp4(tensors, packed=packed)
    else:
        layer = DeployedWeightOnly(tensors, geometry, packed=packed)
    if tensors.transform is not None:
        apply_transform(layer, tensors.transform, -1 if geometry is None else 1)
    return layer
