"""The float form of a deployed layer: the weight that its codes stand for, and no rounded input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.quant.formats.fp8 import DeployedFp8
from trtq.quant.formats.nvfp4 import DeployedNvfp4, nvfp4_numbers
from trtq.quant.formats.weight_only import DeployedWeightOnly, spread_scale
from trtq.quant.geometry import CONVOLUTIONS, ConvGeometry
from trtq.quant.structure import Product

__all__ = ["float_form"]


@torch.no_grad()
def float_form(layer: nn.Module) -> nn.Module:
    """A layer in float with the same weight.

    Args:
        layer: a deployed layer or product; a float layer is returned unchanged.

    Returns:
        An `nn.Linear`, a convolution, or a `Product`. A smoothing or rotation of the input is part of
        the weight.

    Raises:
        QuantizationError: the layer rotates the input of a convolution in groups.
    """
    if isinstance(layer, DeployedProduct):
        return Product()
    if not isinstance(layer, DeployedLayer | DeployedFp8 | DeployedNvfp4 | DeployedWeightOnly):
        return layer
    geometry: ConvGeometry | None = layer.geometry
    weight = _weight(layer)
    transform: Any = getattr(layer, "input_transform", None)
    if transform is not None:
        weight = _behind(weight, transform, geometry)
    new: Any
    if geometry is None:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    else:
        new = CONVOLUTIONS[geometry.axes - 1](
            weight.shape[1] * geometry.groups,
            weight.shape[0],
            _sizes(weight.shape[2:]),  # type: ignore[arg-type]
            stride=geometry.stride,  # type: ignore[arg-type]
            padding=geometry.padding,  # type: ignore[arg-type]
            dilation=geometry.dilation,  # type: ignore[arg-type]
            groups=geometry.groups,
            bias=layer.bias is not None,
        )
    new.weight.copy_(weight)
    if layer.bias is not None:
        new.bias.copy_(layer.bias)
    return new.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _weight(layer: DeployedLayer | DeployedFp8 | DeployedNvfp4 | DeployedWeightOnly) -> Tensor:
    """The weight that the codes stand for, float32 `[N, K, ...]`, behind the layer's transform."""
    if isinstance(layer, DeployedWeightOnly):
        return layer.integers.float() * spread_scale(layer.weight_scale.float(), layer.group)
    if isinstance(layer, DeployedNvfp4):
        return nvfp4_numbers(layer.codes, layer.block_scale) * layer.weight_scale
    if isinstance(layer, DeployedFp8):
        codes = layer.codes.view(torch.float8_e4m3fn).float()
    else:
        codes = layer.integers.float()
    return codes * layer.weight_scale.reshape(-1, *(1,) * (codes.ndim - 1))


def _behind(weight: Tensor, transform: Any, geometry: ConvGeometry | None) -> Tensor:
    """The weight for the input before a linear transform of its channels."""
    groups = 1 if geometry is None else geometry.groups
    channels = weight.shape[1] * groups
    identity = torch.eye(channels)
    # Row c holds what channel c becomes.
    if geometry is None:
        matrix = transform(identity)
    else:
        matrix = transform(identity.reshape(channels, channels, *(1,) * geometry.axes))
    matrix = matrix.reshape(channels, channels)
    if groups > 1:
        if bool((matrix != torch.diag(matrix.diagonal())).any()):
            raise QuantizationError(
                "a convolution in groups with a rotated input has no float form"
            )
        of_group = matrix.diagonal().reshape(groups, -1)
        factors = of_group.repeat_interleave(weight.shape[0] // groups, 0)
        scaled: Tensor = weight * factors.reshape(*factors.shape, *(1,) * (weight.ndim - 2))
        return scaled
    return torch.einsum("nk...,ck->nc...", weight, matrix)
