"""Histogram calibrators for activations: entropy, percentile and mean squared error.

A histogram counts absolute values in bins of equal width from zero. A calibrator chooses the largest
absolute value `amax` that keeps a code; larger values are clipped. The definitions are those of NVIDIA's
TensorRT and of the calibrators in nvidia-modelopt, for one histogram per denoising step:

- entropy: `amax` with the smallest Kullback-Leibler divergence between the histogram, with the clipped
  values in its last bin, and the histogram that `2**(bits - 1)` levels can hold (8-bit Inference with
  TensorRT, GTC 2017, slides 19 to 38).
- percentile: `amax` at this percentile of the absolute values.
- mse: `amax` with the smallest mean squared error of symmetric codes at the bins' centres.

Letters: T steps; B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.calib.calibrators import Calibrator

__all__ = [
    "StepHistograms",
    "entropy_amax",
    "mse_amax",
    "percentile_amax",
]

_BINS = 2048
_MAX_BINS = 4 * _BINS
_FIRST_BIN = 128
"""Smallest number of bins that a range covers."""


class StepHistograms:
    """Histograms of the absolute values of one tensor, one per denoising step.

    The first values of a step determine the width of its bins, `2048` up to their maximum. Larger values
    add bins; at more than 8,192 bins neighbours are joined.

    Args:
        steps: number of histograms T; one: all steps share a histogram.
    """

    def __init__(self, steps: int) -> None:
        self._counts: list[np.ndarray] = [np.zeros(0)] * steps
        self._widths = [0.0] * steps

    def __len__(self) -> int:
        """Number of histograms."""
        return len(self._counts)

    def add(self, step: int, x: Tensor) -> None:
        """Count values.

        Args:
            step: index of the denoising step.
            x: finite values of any shape.
        """
        step = min(step, len(self) - 1)
        x = x.detach().float().abs()
        largest = float(x.max())
        counts, width = self._counts[step], self._widths[step]
        if not width:
            # Zeros determine no width.
            width, counts = largest / _BINS, np.zeros(_BINS)
            if not width:
                return
        while largest > width * len(counts):
            missing = int(np.ceil(largest / width)) - len(counts)
            if len(counts) + missing <= _MAX_BINS:
                counts = np.concatenate([counts, np.zeros(max(1, missing))])
            else:
                even = np.concatenate([counts, np.zeros(len(counts) % 2)])
                width, counts = 2 * width, even.reshape(-1, 2).sum(1)
        added = torch.histc(x, bins=len(counts), min=0, max=width * len(counts))
        self._counts[step], self._widths[step] = counts + added.double().cpu().numpy(), width

    def amax(self, calibrator: Calibrator, bits: int) -> Tensor:
        """The largest absolute value that keeps a code, at each step.

        Args:
            calibrator: the calibrator.
            bits: width of the codes.

        Returns:
            Values `[T]`, float32; infinity where no value other than zero was counted.
        """
        values = [
            _amax(calibrator, counts, width, bits) if width else np.inf
            for counts, width in zip(self._counts, self._widths, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float32)


def percentile_amax(counts: np.ndarray, width: float, percentile: float) -> float:
    """Lower end of the first bin at which the share of counted values reaches a percentile.

    Args:
        counts: histogram of absolute values, `[B]`.
        width: width of a bin.
        percentile: share in percent.
    """
    share = np.cumsum(counts / counts.sum())
    return float(width * np.searchsorted(share, percentile / 100))


def mse_amax(counts: np.ndarray, width: float, bits: int) -> float:
    """The bin centre with the smallest mean squared error of symmetric codes.

    Codes are `round(x (2**(bits - 1) - 1) / amax)`, clipped at `amax`.

    Args:
        counts: histogram of absolute values, `[B]`.
        width: width of a bin.
        bits: width of the codes.
    """
    centres = (np.arange(len(counts)) + 0.5) * width
    first = min(_FIRST_BIN, len(counts) - 1)
    levels = 2 ** (bits - 1) - 1
    errors = []
    for amax in centres[first:]:
        codes = np.rint(np.minimum(centres, amax) * (levels / amax))
        errors.append(float(((codes * (amax / levels) - centres) ** 2 * counts).sum()))
    return float(centres[first + int(np.argmin(errors))])


def entropy_amax(counts: np.ndarray, width: float, bits: int) -> float:
    """The range with the smallest divergence between values and codes.

    Args:
        counts: histogram of absolute values, `[B]`.
        width: width of a bin.
        bits: width of the codes.
    """
    counts = np.asarray(counts, dtype=np.float64).copy()
    if len(counts) > 1:
        # Zeros, e.g. of a rectifier, would outweigh everything else.
        counts[0] = counts[1]
    first = min(_FIRST_BIN, len(counts))
    beyond = counts.sum() - np.cumsum(counts)
    divergences = [
        _divergence(counts[:size], float(beyond[size - 1]), 2 ** (bits - 1))
        for size in range(first, len(counts) + 1)
    ]
    # The widest of equal ranges.
    last = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return float(width * (first + last))


def _divergence(counts: np.ndarray, beyond: float, levels: int) -> float:
    """Divergence between a clipped histogram and what a number of levels can hold.

    Args:
        counts: bins inside of the range.
        beyond: number of values outside of the range, which are clipped to the last bin.
        levels: number of levels.
    """
    size = len(counts)
    edges = np.linspace(0, size, levels + 1)
    level = np.searchsorted(edges, np.arange(size), side="right") - 1
    filled = counts > 0
    total = np.bincount(level[filled], counts[filled], levels)
    number = np.bincount(level[filled], minlength=levels)
    held: Any = np.zeros(size)
    held[filled] = (total / np.maximum(number, 1))[level[filled]]
    given = counts.copy()
    given[-1] += beyond
    if not held.sum() or bool(((given > 0) & (held == 0)).any()):
        return float("inf")
    given, held = given / given.sum(), held / held.sum()
    used = given > 0
    return float((given[used] * np.log(given[used] / held[used])).sum())


def _amax(calibrator: Calibrator, counts: np.ndarray, width: float, bits: int) -> float:
    """The largest absolute value that keeps a code.

    Args:
        calibrator: the calibrator.
        counts: histogram of absolute values, `[B]`.
        width: width of a bin.
        bits: width of the codes.
    """
    if calibrator.name == "entropy":
        return entropy_amax(counts, width, bits)
    if calibrator.name == "mse":
        return mse_amax(counts, width, bits)
    return percentile_amax(counts, width, calibrator.percentile)
