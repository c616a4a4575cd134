"""Ranges of activations by the error of the layer's output.

The search of EfficientDM and QuEST compares values before and after rounding. It clips values that are
rare among all values, though the layer's output may depend on them: at 8 bits its ranges are often worse
than the extremes. Here the candidates are that search's ranges, and the extremes shrunken by several
factors. One candidate is chosen for all steps of a layer: with the smallest mean over steps of the
output's squared error relative to the output's power.

Letters: N, K out / in features or channels; T steps; R rows per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trtq.calib.range_rows import RangeRows
from trtq.calib.transform_error import some_outputs
from trtq.quant.fake_quant import fake_quant
from trtq.quant.ranges import affine_from_range

__all__ = ["ranges_by_output"]

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
Table = tuple[Tensor, Tensor]


@torch.no_grad()
def ranges_by_output(
    rows: RangeRows,
    weights: Sequence[Tensor],
    extremes: tuple[Tensor, Tensor],
    searched: Table,
    bits: int,
    *,
    symmetric: bool,
    linear: bool,
) -> Table:
    """The scales and zero points with the smallest error of the outputs.

    Args:
        rows: sampled rows of the input.
        weights: weights of all layers with this input, `[N, K, ...]` each.
        extremes: smallest and largest values at each step, `[T]` each, or `[1]` for static scales.
        searched: scale and zero point of the search, shaped like the extremes.
        bits: width of the codes.
        symmetric: whether the codes are symmetric, see `trtq.quant.ranges.affine_from_range`.
        linear: whether the layers are linear; the error of a convolution is estimated from second
            moments, as if the errors of its taps were independent.

    Returns:
        `(scale, zero_point)`, shaped like the extremes.
    """
    x, shares = rows.parts()
    measures = [
        _Output(
            x,
            shares,
            some_outputs(weight).float().cpu() if linear else _power_of_inputs(weight, x.shape[-1]),
        )
        for weight in weights
    ]

    def error(table: Table) -> float:
        scale, zero_point = (each[:, None, None] for each in table)
        coded = fake_quant(x, scale, zero_point, 0, 2**bits - 1) - x
        return sum(measure.relative(coded) for measure in measures)

    # Of equal candidates the first one wins.
    return min([searched, *_candidates(extremes, bits, symmetric=symmetric)], key=error)


def _candidates(extremes: tuple[Tensor, Tensor], bits: int, *, symmetric: bool) -> Iterator[Table]:
    low, high = extremes[0].clamp_max(0), extremes[1].clamp_min(0)
    for share in _SHARES:
        yield affine_from_range(low * share, high * share, bits, symmetric=symmetric)


def _power_of_inputs(weight: Tensor, channels: int) -> Tensor:
    """Sum of squared weights by input channel, `[K]`, of a convolution, which may have groups."""
    squares = weight.float().cpu().flatten(2).square().sum(2)
    groups = channels // weight.shape[1]
    return squares.reshape(groups, len(weight) // groups, -1).sum(1).flatten()


class _Output:
    """The power of a layer's output on weighted rows `x[T, R, K]`.

    Args:
        x: the rows.
        shares: weights of the rows, `[T, R]`.
        weight: `[N, K]` of a linear layer, or the sums of squares `[K]` of a convolution.
    """

    def __init__(self, x: Tensor, shares: Tensor, weight: Tensor) -> None:
        self._shares = shares
        self._weight = weight
        self._power = self._of(x).clamp_min(1e-30)

    def _of(self, x: Tensor) -> Tensor:
        if self._weight.ndim == 2:
            values = (x @ self._weight.T).square().mean(2)
        else:
            values = x.square() @ self._weight
        return (values * self._shares).sum(1)

    def relative(self, error: Tensor) -> float:
        """Mean over steps of the output's error for an error `[T, R, K]` of the input."""
        return float((self._of(error) / self._power).mean())
