"""Scale and zero point from data: min-max, and the search of EfficientDM and QuEST.

All results use the affine form with codes `0 .. 2**bits - 1`. A symmetric quantiser has
`zero_point = 2**(bits - 1)`; the int8 operand of an engine needs this form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtq.bits import check_bits
from trtq.errors import NonFiniteError, RecipeError
from trtq.precision import METHODS, Method

__all__ = [
    "activation_qparams",
    "affine_from_range",
    "row_qparams",
    "weight_qparams",
]

_SCALE_FLOOR = 1e-8
_CANDIDATES = 80
_SHRINK = 0.01
_NORM = 2.4
_VALUES_AT_ONCE = 1 << 17
_SERIAL_VALUES = (1 << 15) - 1
_FEW_VALUES = 1 << 12
_OUTER = 16
_MARGIN, _TINY = 1e-3, 1e-40


def _check(x: Tensor, bits: int, method: str) -> None:
    check_bits(bits)
    if method not in METHODS:
        raise RecipeError(f"unknown range method {method!r}; choose one of {', '.join(METHODS)}")
    if x.numel() == 0:
        raise RecipeError("cannot take a range from an empty tensor")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the data to quantise holds NaN or infinity")


def affine_from_range(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that spread `2**bits` codes over `[low, high]`.

    `d = (high - low) / (2**bits - 1)`, `z = round(-low / d)`; computed in float64.

    Args:
        low: lower ends of the ranges, any shape.
        high: upper ends of the ranges, same shape.
        bits: width of the codes.
        symmetric: whether to use `z = 2**(bits - 1)` and the smallest scale that covers both ends.

    Returns:
        `(scale, zero_point)`, float32, shaped like `low`.
    """
    low, high = low.double(), high.double()
    levels = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = torch.maximum(high / (middle - 1), -low / middle).clamp_min(_SCALE_FLOOR)
        zero_point = torch.full_like(scale, middle)
    else:
        scale = ((high - low) / levels).clamp_min(_SCALE_FLOOR)
        zero_point = (-low / scale).round()
    return scale.float(), zero_point.float()


def _candidates_at_once(rows: Tensor) -> int:
    """How many candidates one pass computes: several where the calls would cost more than the values.

    The values stay fewer than torch divides among threads, so the scores are those of single candidates.
    """
    if rows.device.type != "cpu":
        return 1
    return min(max(1, _SERIAL_VALUES // rows.numel()), _CANDIDATES)


def _errors(
    rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int, out: Tensor | None = None
) -> Tensor:
    """`|x - Q(x)|**2.4` of rows `[R, n]` for candidates, `[C, R, n]`; scales, zero points: `[C, R]`."""
    d, z = scale[:, :, None], zero_point[:, :, None]
    codes = torch.div(rows, d, out=out).round_().add_(z).clamp_(0, 2**bits - 1)
    return codes.sub_(z).mul_(d).sub_(rows).abs_().pow_(_NORM)


def _lower_bounds(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> Tensor | None:
    """Lower bounds of the scores of candidates, `[C, R]`, whose ranges are `[C, R]`.

    The outermost values alone rule out most of the narrow ranges, which clip these values. None: with
    few values, and on a GPU, the bounds would cost more than they save.
    """
    count = rows.shape[1] // _OUTER
    if count < 2 or rows.numel() < _FEW_VALUES or rows.device.type != "cpu":
        return None
    middle = ((low[0] + high[0]) / 2)[:, None]
    outer = rows.gather(1, (rows - middle).abs().topk(count, dim=1, sorted=False).indices)
    errors = _errors(outer, *affine_from_range(low, high, bits, symmetric=symmetric), bits)
    # The scores are sums in single precision, whose rounding is far below the margin.
    return errors.double().sum(dim=2) / rows.shape[1] * (1 - _MARGIN) - _TINY


def _search(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The best of 80 ranges whose ends shrink together; the first of equal scores wins.

    For `i = 0 .. 79`, `c = 1 - 0.01 i`, the range is `[c low, c high]` and the score the mean of
    `|x - Q(x)|**2.4` (EfficientDM's and QuEST's "mse" mode).

    Args:
        rows: data, `[R, n]`; one result per row.
        low: lower ends of the full ranges, `[R]`.
        high: upper ends of the full ranges, `[R]`.
        bits: width of the codes.
        symmetric: see `affine_from_range`.
    """
    shrink = torch.tensor(
        [1.0 - _SHRINK * each for each in range(_CANDIDATES)], device=rows.device
    ).to(low.dtype)[:, None]
    at_once = _candidates_at_once(rows)
    bounds = _lower_bounds(rows, low * shrink, high * shrink, bits, symmetric=symmetric)
    best_score = torch.full_like(low, torch.inf, dtype=torch.float32)
    best_scale, best_zero_point = affine_from_range(low, high, bits, symmetric=symmetric)
    # The gap keeps one inner loop per candidate: what a loop leaves over after whole vectors is computed
    # by another routine, whose last bit may differ.
    buffer = torch.empty(at_once, rows.numel() + 1, dtype=rows.dtype, device=rows.device)
    for begin in range(0, _CANDIDATES, at_once):
        some = slice(begin, begin + at_once)
        if bounds is not None and not bool((bounds[some] < best_score).any()):
            continue
        c = shrink[some]
        scale, zero_point = affine_from_range(low * c, high * c, bits, symmetric=symmetric)
        out = buffer[: len(c), :-1].view(len(c), *rows.shape)
        scores = _errors(rows, scale, zero_point, bits, out).mean(dim=2)
        score, first = scores.where(scores < torch.inf, torch.inf).min(dim=0)
        better = score < best_score
        best_score = torch.where(better, score, best_score)
        best_scale = torch.where(better, scale.gather(0, first[None])[0], best_scale)
        best_zero_point = torch.where(better, zero_point.gather(0, first[None])[0], best_zero_point)
    return best_scale, best_zero_point


def row_qparams(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    method: Method,
    *,
    symmetric: bool = False,
    contain_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """One scale and zero point per row, `[R]`, of data `rows[R, n]`.

    Args:
        rows: data, `[R, n]`.
        low: smallest value of each row, `[R]`.
        high: largest value of each row, `[R]`.
        bits: width of the codes, 2 .. 8.
        method: see `weight_qparams`.
        symmetric: see `weight_qparams`.
        contain_zero: see `weight_qparams`.

    Returns:
        `(scale, zero_point)`, float32[R] each.

    Raises:
        RecipeError: unsupported bits or method.
        NonFiniteError: the data holds NaN or infinity.
    """
    _check(rows, bits, method)
    if method == "minmax" or contain_zero:
        low, high = low.clamp_max(0), high.clamp_min(0)
    if method == "minmax":
        return affine_from_range(low, high, bits, symmetric=symmetric)
    # 80 passes over rows that fit in the processor's cache are four times as fast as over all rows.
    count = max(1, _VALUES_AT_ONCE // rows.shape[1])
    parts = [slice(first, first + count) for first in range(0, len(rows), count)]
    results = [
        _search(rows[part], low[part], high[part], bits, symmetric=symmetric) for part in parts
    ]
    scales, zero_points = zip(*results, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def weight_qparams(
    w: Tensor,
    bits: int,
    method: Method = "minmax",
    *,
    symmetric: bool = False,
    contain_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight, one per output channel.

    Args:
        w: weight, `[N, ...]`, output channels first.
        bits: width of the codes, 2 .. 8.
        method: `minmax` spreads the codes over each channel's range, extended to zero; `search` tries
            80 shrunken ranges and keeps the range with the smallest mean of `|error|**2.4`. As in
            the released code, `search` does not extend the range, so the zero point of a one-sided
            channel may lie outside the codes.
        symmetric: whether to use zero point `2**(bits - 1)`; 8-bit weights fit int8 in this form only.
        contain_zero: whether to extend the searched range to zero, so that the zero point is a code.

    Returns:
        `(scale, zero_point)`, float32, shape `[N, 1, ...]`; the zero point is an integer.

    Raises:
        RecipeError: unsupported bits or method.
        NonFiniteError: the weight holds NaN or infinity.
    """
    if w.ndim < 2 or w.numel() == 0:
        raise RecipeError(f"a weight has shape [N, ...] with at least 2 axes, got {tuple(w.shape)}")
    rows = w.detach().flatten(1).float()
    scale, zero_point = row_qparams(
        rows,
        rows.amin(1),
        rows.amax(1),
        bits,
        method,
        symmetric=symmetric,
        contain_zero=contain_zero,
    )
    shape = (len(w), *(1,) * (w.ndim - 1))
    return scale.reshape(shape), zero_point.reshape(shape)


def activation_qparams(
    x: Tensor,
    bits: int,
    method: Method = "search",
    *,
    symmetric: bool = False,
    contain_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an activation, one pair for the whole tensor.

    Args:
        x: activation of any shape.
        bits: width of the codes, 2 .. 8.
        method: see `weight_qparams`.
        symmetric: whether to use zero point `2**(bits - 1)`.
        contain_zero: see `weight_qparams`.

    Returns:
        `(scale, zero_point)`, float32 scalars (shape `[]`).

    Raises:
        RecipeError: unsupported bits or method.
        NonFiniteError: the data holds NaN or infinity.
    """
    rows = x.detach().reshape(1, -1).float()
    scale, zero_point = row_qparams(
        rows,
        rows.amin(1),
        rows.amax(1),
        bits,
        method,
        symmetric=symmetric,
        contain_zero=contain_zero,
    )
    return scale[0], zero_point[0]
