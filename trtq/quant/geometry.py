"""Geometry of a 2-D convolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from trtq.errors import QuantizationError

__all__ = ["ConvGeometry"]


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution without its weights; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvGeometry:
        """The geometry of a layer.

        Raises:
            QuantizationError: the layer pads with values other than zeros.
        """
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise QuantizationError(
                f"a convolution with padding={conv.padding!r}, padding_mode={conv.padding_mode!r} "
                "cannot be quantised; only explicit zero padding is exact in integers"
            )
        height_width = (conv.stride, conv.padding, conv.dilation)
        stride, padding, dilation = ((int(pair[0]), int(pair[1])) for pair in height_width)
        return cls(stride, padding, dilation, conv.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x[B,K,H,W] -> [B,N,H',W']."""
        return functional.conv2d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )
