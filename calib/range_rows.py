"""Rows of a layer's input that hold its largest values, and a random sample of the others.

Clipping changes only large values, and a random sample of a few hundred rows shows few of them. The rows
with the largest values are therefore kept apart, and both parts are weighted by the number of rows that
they stand for (a stratified sample).

Letters: K channels; T steps; R rows per step and part; N rows of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtq.seeds import seeded_generator

__all__ = ["RangeRows", "input_rows"]

_ROWS = 512
"""Rows of each part, over all steps."""
_MIN_ROWS = 8


def input_rows(x: Tensor, *, linear: bool) -> Tensor:
    """The rows `[N, K]` of an input, `[..., K]` of a linear layer or `[B, K, ...]` of a convolution."""
    rows = x if linear else x.movedim(1, -1)
    return rows.reshape(-1, rows.shape[-1])


class RangeRows:
    """A stratified sample of the rows of one input at each denoising step.

    A row holds the channels of one token or one pixel.

    Args:
        steps: number of steps T.
        seed: seed of the random part.
    """

    def __init__(self, steps: int, seed: int) -> None:
        self._each = max(_MIN_ROWS, _ROWS // steps)
        self._steps = steps
        self._count = [0] * steps
        self._generator = seeded_generator(seed, "rows for ranges")
        self._drawn = self._largest = torch.zeros(0)
        self._keys = torch.zeros(0)

    def add(self, step: int, x: Tensor) -> None:
        """Take rows.

        Args:
            step: index of the denoising step.
            x: rows `[N, K]`, float32, on the CPU.
        """
        if not self._drawn.numel():
            self._drawn = torch.zeros(self._steps, self._each, x.shape[1])
            self._largest = torch.zeros_like(self._drawn)
            # Rows that are not there have the key -1, smaller than every largest absolute value.
            self._keys = torch.full((self._steps, self._each), -1.0)
        keys = torch.cat([self._keys[step], x.abs().amax(1)])
        rows = torch.cat([self._largest[step], x])
        top = keys.topk(self._each).indices
        self._keys[step], self._largest[step] = keys[top], rows[top]
        before, self._count[step] = self._count[step], self._count[step] + len(x)
        # Every row has the same probability of being in each place (reservoir sampling of blocks).
        drawn = x[torch.randint(len(x), (self._each,), generator=self._generator)]
        replaced = torch.rand(self._each, generator=self._generator) < len(x) / (before + len(x))
        self._drawn[step] = torch.where(replaced[:, None], drawn, self._drawn[step])

    def parts(self) -> tuple[Tensor, Tensor]:
        """The sample.

        Returns:
            Rows `[T, 2R, K]` and their weights `[T, 2R]`, which sum to 1 at every step that has rows. A
            row of weight 0 is not part of the sample.
        """
        count = torch.tensor(self._count, dtype=torch.float32)[:, None]
        kept = (self._keys >= 0).float()
        # Of the random part count the rows that are not among the largest.
        others = (self._drawn.abs().amax(2) < self._keys.amin(1, keepdim=True)).float()
        number = kept.sum(1, keepdim=True)
        rest = (count - number).clamp_min(0) / others.sum(1, keepdim=True).clamp_min(1)
        weights = torch.cat([kept, others * rest], dim=1)
        total = weights.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([self._largest, self._drawn], dim=1), weights / total
