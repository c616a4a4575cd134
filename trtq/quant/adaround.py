"""Learned rounding of weights (AdaRound, arXiv 2004.10568), with weights that stay trainable (QuEST).

    code = clip(floor(w / d) + h + z, 0, 2**bits - 1)

`h` is 1 for a weight that is rounded up and 0 for a weight that is rounded down. While the directions
are learned, they are soft, `h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1)`; afterwards they are frozen,
`h = [alpha >= 0]`. Fine-tuning may still change `w`: the floor has a straight-through gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["directed_codes", "hard_direction", "initial_alpha", "rounding_loss", "soft_direction"]

_LOW, _HIGH = -0.1, 1.1


class _FloorSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def soft_direction(alpha: Tensor) -> Tensor:
    """The rectified sigmoid of `alpha`, in [0, 1] (AdaRound, eq. 23)."""
    return (torch.sigmoid(alpha) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def hard_direction(alpha: Tensor) -> Tensor:
    """1 for weights that are rounded up, 0 for the others."""
    return (alpha >= 0).to(alpha.dtype)


def initial_alpha(w: Tensor, scale: Tensor) -> Tensor:
    """The `alpha` whose soft direction is the fractional part of `w / scale`.

    The hard direction of that `alpha` rounds to nearest.
    """
    ratio = w / scale
    rest = ratio - ratio.floor()
    return -torch.log((_HIGH - _LOW) / (rest - _LOW) - 1)


def directed_codes(
    w: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, direction: Tensor
) -> Tensor:
    """Codes with the given rounding directions, float32; differentiable in `w` and `direction`.

    Args:
        w: weight, `[N, ...]`.
        scale: scale `d`, broadcastable to `w`.
        zero_point: zero point `z`, integers, broadcastable to `w`.
        qmax: largest code.
        direction: directions `h`, shaped like `w`.
    """
    floor: Tensor = _FloorSte.apply(w / scale)  # type: ignore[no-untyped-call]
    return (floor + direction + zero_point).clamp(0, qmax)


def rounding_loss(alpha: Tensor, temperature: float) -> Tensor:
    """`sum(1 - |2 h - 1|**temperature)`: zero if every soft direction is 0 or 1 (AdaRound, eq. 24).

    Args:
        alpha: learned rounding, of any shape.
        temperature: exponent, positive.
    """
    return (1 - (2 * soft_direction(alpha) - 1).abs().pow(temperature)).sum()
