"""E2M1 numbers in blocks of 16 with E4M3 scales (NVFP4), for weights and activations.

    u    = half(clip(x / s, -LIMIT, LIMIT))                  activations; weights are not rounded to half
    b    = e4m3(max |u| of the block / 6 / UNIT)             scale of a block of 16 neighbours
    k    = e2m1(u / (b * UNIT))                              codes 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign
    Q(x) = k * b * UNIT * s

`UNIT` is a power of two, so it changes no digit; with it every operand is at most about 1, and a product
in half precision cannot overflow. `s` is the one float scale: of an input at a denoising step, or of a
weight. TensorRT computes `b` and `k` of an input in one operator with the constant scale `UNIT`
(`trt::TRT_FP4DynamicQuantize`).

Weights are rounded by Four-over-Six (arXiv 2512.02010): the largest number of a block becomes 6 or 4,
whichever gives the smaller sum of squared errors. The distance of neighbouring codes is 1 below 4 and 2
above, so a block with many numbers near its largest gains from 4. Scales of a weight leave room for
that: the largest is 256, and 256 * 6 / 4 = 384 is an E4M3 number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtq.quant.formats.fp8 import FP8_MAX, e4m3

__all__ = [
    "BLOCK",
    "E2M1",
    "LIMIT",
    "UNIT",
    "WEIGHT_LIMIT",
    "block_numbers",
    "e2m1",
    "input_numbers",
    "weight_blocks",
]

BLOCK = 16
"""Number of neighbours along the last axis that share a scale."""
UNIT = 2.0**-11
"""Value of a block scale of 1."""
_MAX = 6.0
_FOUR = 4.0
LIMIT = _MAX * FP8_MAX * UNIT
"""Largest number of an input that the format represents, 1.3125."""
WEIGHT_LIMIT = _MAX * 256 * UNIT
"""Largest number of a weight, 0.75."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of E2M1 by bit pattern; patterns 8 .. 15 have the same numbers with a minus sign."""


def e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 numbers, float32, saturated at 6; halves round to the even bit pattern."""
    size = x.abs()
    small = (size * 2).round() / 2
    large = (size / 2).round() * 2
    number = torch.where(size < 2, small, torch.where(size < _FOUR, size.round(), large))
    return torch.copysign(number.clamp_max(_MAX), x) + 0.0


def _blocks(u: Tensor) -> Tensor:
    return u.reshape(*u.shape[:-1], -1, BLOCK)


def block_numbers(u: Tensor, largest: float = _MAX) -> tuple[Tensor, Tensor]:
    """Block scales and numbers of `u`.

    Args:
        u: float32 `[..., K]`, K a multiple of `BLOCK`.
        largest: the number that the largest of a block becomes.

    Returns:
        E4M3 scales `b`, float32 `[..., K / 16]`, and E2M1 numbers `k`, float32 `[..., K / 16, 16]`. A
        block whose scale rounds to 0 is 0.
    """
    blocks = _blocks(u)
    scale = e4m3(blocks.abs().amax(-1) / largest * (1 / UNIT))
    divisor = torch.where(scale > 0, scale * UNIT, torch.ones_like(scale))
    numbers = e2m1(blocks / divisor[..., None]) * (scale > 0)[..., None]
    return scale, numbers


def input_numbers(x: Tensor, inv_scale: Tensor) -> Tensor:
    """The represented numbers of an input in units of its scale, float32 `[..., K]`.

    Args:
        x: input, `[..., K]`.
        inv_scale: reciprocal of the scale `s`, broadcastable to `x`.
    """
    u = (x.float() * inv_scale).clamp(-LIMIT, LIMIT).half().float()
    scale, numbers = block_numbers(u)
    return (numbers * (scale * UNIT)[..., None]).reshape(x.shape)


def weight_blocks(u: Tensor) -> tuple[Tensor, Tensor]:
    """Block scales and numbers of a weight by Four-over-Six.

    Args:
        u: weight in units of its scale, float32 `[N, K]`, at most `WEIGHT_LIMIT`.

    Returns:
        As `block_numbers`.
    """
    blocks = _blocks(u).double()
    choices = [block_numbers(u, largest) for largest in (_MAX, _FOUR)]
    errors = [
        (numbers.double() * (scale.double() * UNIT)[..., None] - blocks).square().sum(-1)
        for scale, numbers in choices
    ]
    four = errors[1] < errors[0]
    (scale_6, numbers_6), (scale_4, numbers_4) = choices
    return (
        torch.where(four, scale_4, scale_6),
        torch.where(four[..., None], numbers_4, numbers_6),
    )
