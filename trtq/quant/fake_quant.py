"""Fake quantisation: the rounding rule that training, merging and every exported graph share.

With scale `d`, zero point `z` and integer range `[qmin, qmax]`:

    k  = round(x / d) + z        round = half to even
    kc = min(max(k, qmin), qmax)
    Q(x) = (kc - z) * d

Activations are multiplied by the float32 reciprocal `1 / d`, which the exported graphs store, instead of
being divided by `d`; the two differ only for values within one ulp of a rounding tie.

Straight-through gradients, multiplied by the upstream gradient and summed over the elements that share
a parameter (EfficientDM, arXiv 2310.03270, and QuEST, arXiv 2402.03666, as released; an element counts
as inside or outside by its rounded code, and there is no LSQ gradient scale):

| element is                   | dQ/dx | dQ/dd                | dQ/dz |
|------------------------------|-------|----------------------|-------|
| inside, `qmin <= k <= qmax`  | 1     | `round(x/d) - x/d`   | 0     |
| below                        | 0     | `qmin - z`           | `-d`  |
| above                        | 0     | `qmax - z`           | `-d`  |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_quant", "quantize_codes", "round_ste"]


def _ratio(x: Tensor, scale: Tensor, reciprocal: bool) -> Tensor:
    return x * scale.reciprocal() if reciprocal else x / scale


def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The clipped codes `kc` of `x / d`, float32; integers if `zero_point` is an integer.

    Args:
        x: floating-point tensor of any shape.
        scale: scale `d > 0`, float32, broadcastable to `x`.
        zero_point: zero point `z`, float32, broadcastable to `x`.
        qmin: smallest code.
        qmax: largest code.
    """
    return ((x / scale).round() + zero_point).clamp(qmin, qmax)


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: sum `gradient` over the axes along which `shape` was expanded."""
    return gradient.sum_to_size(shape) if gradient.shape != shape else gradient


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        reciprocal: bool,
    ) -> Tensor:
        ratio = _ratio(x, scale, reciprocal)
        codes = (ratio.round() + zero_point).clamp_(qmin, qmax)
        ctx.save_for_backward(ratio, scale, zero_point)
        ctx.range = qmin, qmax
        return codes.sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        ratio, scale, zero_point = ctx.saved_tensors
        qmin, qmax = ctx.range
        rounded = ratio.round()
        codes = rounded + zero_point
        inside = (codes >= qmin) & (codes <= qmax)
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient * inside
        if ctx.needs_input_grad[1]:
            clipped = codes.clamp(qmin, qmax).sub_(zero_point)
            slope = torch.where(inside, rounded.sub_(ratio), clipped)
            grad_scale = _sum_to(slope.mul_(gradient), scale.shape)
        if ctx.needs_input_grad[2]:
            outside = torch.where(inside, gradient.new_zeros(()), gradient) * -scale
            grad_zero_point = _sum_to(outside, zero_point.shape)
        return grad_x, grad_scale, grad_zero_point, None, None, None


def fake_quant(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    qmin: int,
    qmax: int,
    *,
    reciprocal: bool = False,
) -> Tensor:
    """Quantise and dequantise, differentiable in `x`, `scale` and `zero_point`.

    Args:
        x: floating-point tensor of any shape; the result has its shape and dtype.
        scale: scale `d > 0`, broadcastable to `x`: a scalar, `[B,1,1,1]` (one scale per image) or
            `[N,1,1,1]` (one scale per output channel).
        zero_point: zero point `z`, broadcastable to `x`; a deployed layer needs an integer.
        qmin: smallest code, e.g. 0.
        qmax: largest code, e.g. `2**bits - 1`.
        reciprocal: whether to multiply by `1 / d`, as deployed activations do, instead of dividing by
            `d`.

    Returns:
        `Q(x)` as the module docstring defines it.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    zero_point = torch.as_tensor(zero_point, dtype=torch.float32, device=x.device)
    result: Tensor = _FakeQuant.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, qmin, qmax, reciprocal
    )
    return result


class _RoundSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through."""
    result: Tensor = _RoundSte.apply(x)  # type: ignore[no-untyped-call]
    return result
