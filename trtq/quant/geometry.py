"""Geometry of a convolution over 1, 2 or 3 axes, and the sizes that float layers have as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trtq.errors import QuantizationError

__all__ = ["CONVOLUTIONS", "ConvGeometry", "FloatLayer", "padding_obstacle", "set_sizes"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes of convolutions that can be low-bit, by number of axes."""
FloatLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""A float layer with a weight that can be low-bit."""

_OPERATIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


def padding_obstacle(conv: nn.Module) -> str | None:
    """The reason why the padding of a convolution cannot be low-bit; None if it can."""
    padding: Any = getattr(conv, "padding", 0)
    mode: Any = getattr(conv, "padding_mode", "zeros")
    if mode == "zeros" and not isinstance(padding, str):
        return None
    return (
        f"a convolution with padding={padding!r}, padding_mode={mode!r} cannot be quantised; only "
        "explicit zero padding is exact in integers"
    )


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution without its weights; every tuple has one entry per axis, in the order of the input.

    The axes are (length), (height, width) or (depth, height, width).

    Attributes:
        stride: distance between neighbouring windows.
        padding: number of zeros on each side.
        dilation: distance between neighbouring kernel taps.
        groups: number of channel groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
        """The geometry of a layer.

        Raises:
            QuantizationError: the layer pads with values other than zeros, or names its padding.
        """
        obstacle = padding_obstacle(conv)
        if obstacle is not None:
            raise QuantizationError(obstacle)
        sizes: tuple[Any, Any, Any] = (conv.stride, conv.padding, conv.dilation)
        stride, padding, dilation = (tuple(int(size) for size in axes) for axes in sizes)
        return cls(stride, padding, dilation, conv.groups)

    @property
    def axes(self) -> int:
        """Number of axes of the convolution, 1 .. 3."""
        return len(self.stride)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x[B, K, *size]` -> `[B, N, *size']`, with one size per axis."""
        operation = _OPERATIONS[self.axes - 1]
        result: Tensor = operation(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return result


def set_sizes(layer: Any, shape: Sequence[int], geometry: ConvGeometry | None) -> None:
    """Set the sizes that `nn.Linear` and `nn.Conv2d` have as attributes, which other code reads.

    Args:
        layer: low-bit layer; its attributes are set.
        shape: shape of the weight, `[N, K, ...]`; K counts the channels of one group.
        geometry: geometry of a convolution; None for a linear layer.
    """
    if geometry is None:
        layer.out_features, layer.in_features = int(shape[0]), int(shape[1])
        return
    layer.out_channels, layer.in_channels = int(shape[0]), int(shape[1]) * geometry.groups
    layer.kernel_size = tuple(int(size) for size in shape[2:])
    layer.stride, layer.padding = geometry.stride, geometry.padding
    layer.dilation, layer.groups = geometry.dilation, geometry.groups
    layer.padding_mode = "zeros"
