"""What a number of timings say, and whether two sets of them differ by more than their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

__all__ = ["Verdict", "compare_medians", "median_interval", "quantile", "speedup", "summarize"]

Verdict = Literal["faster", "slower", "within the spread"]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summarize(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Seconds of single calls, by turn -> milliseconds.

    Returns:
        `p50`, `p90`, `p99`, quartiles `q1` and `q3`, `calls`, and `turns`: the median of each turn.
    """
    milliseconds = [1e3 * value for turn in turns for value in turn]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "q1": 0.25, "q3": 0.75}
    return {name: quantile(milliseconds, share) for name, share in shares.items()} | {
        "calls": len(milliseconds),
        "turns": [1e3 * statistics.median(turn) for turn in turns],
    }


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval that holds the median with at least this confidence, whatever the distribution.

    By order statistics: the k-th smallest and k-th largest value, with the largest k for which a
    binomial count of n fair throws leaves `k .. n - k` seldom enough. With fewer than six values no k
    will do, and it is the whole range.
    """
    ordered, count = sorted(values), len(values)
    outside, skipped = 0.0, 0
    for index in range(count // 2):
        outside += 2 * math.comb(count, index) / 2**count
        if outside > 1 - confidence:
            break
        skipped = index
    return ordered[skipped], ordered[count - 1 - skipped]


def speedup(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times faster than the baseline, from medians of turns that were taken together.

    Returns:
        `ratio` (above 1: faster), `low` and `high` (its 95 % interval), `verdict`.
    """
    ratios = [theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]
    low, high = median_interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "verdict": _verdict(low > 1, high < 1),
    }


def compare_medians(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Medians of turns of two measurements that were not taken together.

    Returns:
        `before` and `after` (medians), `ratio` (above 1: `after` is faster), `verdict`: a difference
        only where the 95 % intervals of both do not touch.
    """
    old, new = statistics.median(before), statistics.median(after)
    low, high = median_interval(before)
    new_low, new_high = median_interval(after)
    verdict = _verdict(new_high < low, new_low > high)
    return {"before": old, "after": new, "ratio": old / new, "verdict": verdict}


def _verdict(faster: bool, slower: bool) -> Verdict:
    if faster:
        return "faster"
    return "slower" if slower else "within the spread"
