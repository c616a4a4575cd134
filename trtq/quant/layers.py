"""The quantised linear layer and the quantised convolutions over 1, 2 and 3 axes."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from trtq.quant.geometry import ConvGeometry, FloatLayer
from trtq.quant.modules import QuantLayer

__all__ = [
    "QUANT_LAYERS",
    "QuantConv",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
]


class QuantLinear(QuantLayer):
    """`nn.Linear` on quantised operands; `lora_A[R, K]`, `lora_B[N, R]`."""

    kind = "linear"

    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, in_features = self.weight.shape
        return (rank, in_features), (out_features, rank)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


class QuantConv(QuantLayer):
    """A convolution on quantised operands; `lora_A[R, K/groups, *kernel]`, `lora_B[N, R, 1, ...]`."""

    geometry: ConvGeometry

    def _take_geometry(self, source: FloatLayer) -> ConvGeometry:
        self.geometry = ConvGeometry.of(cast("nn.Conv2d", source))
        return self.geometry

    def _adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_channels, *rest = self.weight.shape
        return (rank, *rest), (out_channels, rank, *(1,) * self.geometry.axes)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.geometry.convolve(x, weight, bias)


class QuantConv1d(QuantConv):
    """`nn.Conv1d` on quantised operands."""

    kind = "conv1d"


class QuantConv2d(QuantConv):
    """`nn.Conv2d` on quantised operands."""

    kind = "conv2d"


class QuantConv3d(QuantConv):
    """`nn.Conv3d` on quantised operands."""

    kind = "conv3d"


QUANT_LAYERS: dict[str, type[QuantLayer]] = {
    layer.kind: layer for layer in (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d)
}
"""The quantised class of each kind of layer with a weight."""
