"""Statistics of timings: quantiles, intervals of medians, and verdicts about differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, TypedDict

__all__ = [
    "CONFIDENCE",
    "Comparison",
    "Speedup",
    "Summary",
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
"""Minimum number of calls for p99; with fewer calls, p99 would be the slowest call."""


class Summary(TypedDict):
    """Statistics of the calls of one part, in milliseconds.

    Attributes:
        p50: median of all calls.
        p90: 90th percentile of all calls.
        p99: 99th percentile of all calls; None if there are fewer than 100 calls.
        q1: first quartile of all calls.
        q3: third quartile of all calls.
        calls: number of calls.
        turns: median of each timing round, in milliseconds.
    """

    p50: float
    p90: float
    p99: float | None
    q1: float
    q3: float
    calls: int
    turns: list[float]


class Speedup(TypedDict):
    """Speed relative to a baseline.

    Attributes:
        ratio: baseline time divided by the row's time; above 1 the row is faster.
        low: lower bound of the ratio's interval; None if there are too few rounds.
        high: upper bound of the ratio's interval; None if there are too few rounds.
        verdict: `faster`, `slower`, `within the spread` or `too few turns`.
    """

    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


class Comparison(TypedDict):
    """Medians of two measurements that were made at different times.

    Attributes:
        before: median of the earlier measurement.
        after: median of the later measurement.
        ratio: improvement factor; above 1, `after` is better.
        verdict: `better`, `worse`, `within the spread` or `too few turns`.
    """

    before: float
    after: float
    ratio: float
    verdict: Verdict


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summarize(turns: Sequence[Sequence[float]]) -> Summary:
    """Summarise the durations of single calls, in seconds, grouped by timing round."""
    milliseconds = [1e3 * value for turn in turns for value in turn]
    has_p99 = len(milliseconds) >= _MIN_CALLS_P99
    return {
        "p50": quantile(milliseconds, 0.5),
        "p90": quantile(milliseconds, 0.9),
        "q1": quantile(milliseconds, 0.25),
        "q3": quantile(milliseconds, 0.75),
        "p99": quantile(milliseconds, 0.99) if has_p99 else None,
        "calls": len(milliseconds),
        "turns": [1e3 * statistics.median(turn) for turn in turns],
    }


def median_interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """Distribution-free confidence interval of the median, at 95 % over all comparisons.

    The bounds are order statistics: the k-th smallest and k-th largest of n values, with the largest k
    for which the median lies outside them with a sufficiently small probability. The number of values
    below the median is binomial(n, 1/2), assuming independent values.

    Args:
        values: one value per timing round, assumed independent.
        comparisons: number of intervals that must hold jointly (Bonferroni correction).

    Returns:
        Lower and upper bound, or None with fewer than `min_turns(comparisons)` values: even their full
        range does not reach the confidence level.
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
    """Minimum number of values whose range holds the median with 95 % confidence in all comparisons.

    All n values lie on one side of the median with probability 2 / 2^n: six values for one comparison.
    """
    return math.ceil(math.log2(2 * comparisons / (1 - CONFIDENCE)))


def speedup(baseline: Sequence[float], ours: Sequence[float], comparisons: int = 1) -> Speedup:
    """Compute the speedup over the baseline from the medians of interleaved rounds.

    Args:
        baseline: median of each round of the baseline, in milliseconds.
        ours: median of each round of the compared row, in milliseconds.
        comparisons: number of comparisons to correct for, see `median_interval`.
    """
    ratios = [theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]
    low, high = median_interval(ratios, comparisons) or (None, None)
    verdict: Verdict = "within the spread"
    if low is None or high is None:
        verdict = "too few turns"
    elif low > 1 or high < 1:
        verdict = "faster" if low > 1 else "slower"
    return {"ratio": statistics.median(ratios), "low": low, "high": high, "verdict": verdict}


def compare_medians(
    before: Sequence[float], after: Sequence[float], *, more_is_better: bool = False
) -> Comparison:
    """Compare the medians of two measurements whose rounds were not interleaved.

    The verdict is `better` or `worse` only if the 95 % intervals of both medians do not overlap.

    Args:
        before: values of the earlier measurement, one per round.
        after: values of the later measurement, one per round.
        more_is_better: whether larger values are better.
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
