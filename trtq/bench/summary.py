"""What a number of timings say, and whether two sets of them differ by more than their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

__all__ = [
    "CONFIDENCE",
    "Verdict",
    "compare_medians",
    "median_interval",
    "min_turns",
    "quantile",
    "speedup",
    "summarize",
]

CONFIDENCE = 0.95
Verdict = Literal["faster", "slower", "better", "worse", "within the spread", "too few turns"]

_MIN_CALLS_P99 = 100
"""With fewer, none is expected beyond the 99th percentile: it would be read off the slowest call."""


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
        `p50`, `p90`, `p99` (None with fewer than 100 calls), quartiles `q1` and `q3`, `calls`, and
        `turns`: the median of each turn.
    """
    milliseconds = [1e3 * value for turn in turns for value in turn]
    shares = {"p50": 0.5, "p90": 0.9, "q1": 0.25, "q3": 0.75}
    enough = len(milliseconds) >= _MIN_CALLS_P99
    return {name: quantile(milliseconds, share) for name, share in shares.items()} | {
        "p99": quantile(milliseconds, 0.99) if enough else None,
        "calls": len(milliseconds),
        "turns": [1e3 * statistics.median(turn) for turn in turns],
    }


def median_interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """An interval that holds the median with 95 % confidence, whatever the distribution.

    By order statistics: the k-th smallest and k-th largest value, with the largest k for which a
    binomial count of n fair throws leaves `k .. n - k` seldom enough.

    Args:
        values: independent ones.
        comparisons: this is one of so many intervals, which are to hold all together with that
            confidence (Bonferroni).

    Returns:
        None with fewer than `least_turns(comparisons)` values: not even their whole range will do.
    """
    ordered, count = sorted(values), len(values)
    if count < min_turns(comparisons):
        return None
    outside, skipped = 0.0, 0
    for index in range(count // 2):
        outside += 2 * math.comb(count, index) / 2**count
        if outside > (1 - CONFIDENCE) / comparisons:
            break
        skipped = index
    return ordered[skipped], ordered[count - 1 - skipped]


def min_turns(comparisons: int = 1) -> int:
    """The fewest values whose whole range holds the median with 95 % confidence in all comparisons.

    All n lie on one side of the median with a chance of 2 / 2^n: six values for one comparison.
    """
    return math.ceil(math.log2(2 * comparisons / (1 - CONFIDENCE)))


def speedup(
    baseline: Sequence[float], ours: Sequence[float], comparisons: int = 1
) -> dict[str, Any]:
    """How many times faster than the baseline, from medians of turns that were taken together.

    Args:
        baseline: milliseconds by turn.
        ours: likewise.
        comparisons: see `median_interval`.

    Returns:
        `ratio` (above 1: faster), `low` and `high` (its interval; None with too few turns), `verdict`.
    """
    ratios = [theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]
    found = median_interval(ratios, comparisons)
    low, high = found or (None, None)
    verdict: Verdict = "within the spread"
    if low is None or high is None:
        verdict = "too few turns"
    elif low > 1 or high < 1:
        verdict = "faster" if low > 1 else "slower"
    return {"ratio": statistics.median(ratios), "low": low, "high": high, "verdict": verdict}


def compare_medians(
    before: Sequence[float], after: Sequence[float], *, more_is_better: bool = False
) -> dict[str, Any]:
    """Medians of turns of two measurements that were not taken together.

    Returns:
        `before` and `after` (medians), `ratio` (above 1: `after` is better), `verdict`: a difference
        only where the 95 % intervals of both do not touch.
    """
    old, new = statistics.median(before), statistics.median(after)
    then, now = median_interval(before), median_interval(after)
    verdict: Verdict = "within the spread"
    if then is None or now is None:
        verdict = "too few turns"
    elif now[1] < then[0] or now[0] > then[1]:
        verdict = "better" if (new > old) == more_is_better else "worse"
    ratio = new / old if more_is_better else old / new
    return {"before": old, "after": new, "ratio": ratio, "verdict": verdict}
