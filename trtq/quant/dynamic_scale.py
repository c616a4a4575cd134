"""Scales that are computed from the activation itself, one per row.

    step     s[t], from the table of the quantiser
    row      s_r = max|x_row| / qmax
    hybrid   min(s_r, s[t])

A row holds what one output value of the product sums over: the channels of a token for a linear layer,
all values of an image for a convolution, and a row or a column of a product's operands. Each scale
therefore commutes with the product.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = [
    "SMALLEST_RANGE",
    "RowAxis",
    "ScaleChoice",
    "ScalePolicy",
    "largest_code",
    "row_scale",
]

ScalePolicy = Literal["step", "row", "hybrid"]
"""Origin of an activation's scale, see the module docstring."""

ScaleChoice = Literal["step", "row", "hybrid", "auto"]
"""Origin of an activation's scale in a recipe. `auto`: calibration chooses `step` or `row` for each
linear layer, and each product of attention, by the error of the output; everything else has `step`."""

RowAxis = Literal["last", "second_last", "image"]
"""What a row is: `last`: the last axis varies within a row; `second_last`: the axis before it, for the
right operand of a product; `image`: everything but the first axis."""

SMALLEST_RANGE = 1e-20
"""Smallest range of a row, so that a row of zeros has a scale, too."""


def largest_code(bits: int) -> int:
    """Code of the largest absolute value of a row: `2**(bits - 1) - 1`."""
    return int(2 ** (bits - 1) - 1)


def row_scale(x: Tensor, bits: int, axis: RowAxis) -> Tensor:
    """One scale per row, `max|x_row| / qmax`, float32, with size 1 along the axes within a row.

    Args:
        x: activation; its values are taken as they are, without gradient.
        bits: width of the codes.
        axis: what a row is.
    """
    magnitude = x.detach().float().abs()
    if axis == "image":
        largest = magnitude.flatten(1).amax(1).reshape(-1, *(1,) * (x.ndim - 1))
    else:
        largest = magnitude.amax(-1 if axis == "last" else -2, keepdim=True)
    scale: Tensor = largest.clamp_min(SMALLEST_RANGE) * (1 / largest_code(bits))
    return scale
