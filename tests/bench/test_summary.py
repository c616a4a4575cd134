"""Quantiles, intervals and verdicts."""

import math

import numpy as np
import pytest

from trtq.bench.summary import (
    compare_medians,
    median_interval,
    min_turns,
    quantile,
    speedup,
    summarize,
)


def test_quantiles_equal_numpy():
    values = np.random.default_rng(0).standard_normal(101).tolist()
    for share in (0, 0.25, 0.5, 0.9, 0.99, 1):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_a_summary_is_in_milliseconds_and_keeps_the_round_medians():
    summary = summarize([[0.001, 0.003], [0.002]])
    assert (summary["p50"], summary["calls"]) == (2.0, 3)
    assert summary["turns"] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("calls", "measured"), [(10, False), (99, False), (100, True), (500, True)]
)
def test_p99_needs_a_hundred_calls(calls, measured):
    summary = summarize([[0.001] * calls])
    assert (summary["p99"] is not None) == measured
    assert summary["calls"] == calls


@pytest.mark.parametrize(
    ("comparisons", "turns"), [(1, 6), (2, 7), (4, 8), (8, 9), (16, 10), (25, 10), (26, 11)]
)
def test_the_range_of_the_minimum_number_of_rounds_has_the_confidence(comparisons, turns):
    assert min_turns(comparisons) == turns
    missed = [comparisons * 2 / 2**count for count in (turns, turns - 1)]
    assert missed[0] <= 0.05 < missed[1]
    assert median_interval(range(turns), comparisons) == (0, turns - 1)
    assert median_interval(range(turns - 1), comparisons) is None


@pytest.mark.parametrize(("count", "skipped"), [(6, 0), (9, 1), (10, 1), (20, 5)])
def test_the_interval_of_the_median_has_the_confidence(count, skipped):
    low, high = median_interval(list(range(count)))
    assert (low, high) == (skipped, count - 1 - skipped)
    missed = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
    assert missed <= 0.05 < missed + 2 * math.comb(count, skipped + 1) / 2**count


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 6, 8, 10, 20])
@pytest.mark.parametrize("comparisons", [1, 8])
def test_family_wise_false_positive_rate_is_limited_to_5_percent(turns, comparisons):
    """At most one of twenty runs has a verdict for any comparison of equal rows."""
    rng = np.random.default_rng(turns)
    runs = 2000
    wrong = 0
    for _ in range(runs):
        ours, theirs = rng.lognormal(sigma=0.1, size=(2, comparisons, turns))
        verdicts = {
            speedup(a.tolist(), b.tolist(), comparisons)["verdict"]
            for a, b in zip(theirs, ours, strict=True)
        }
        wrong += bool(verdicts & {"faster", "slower"})
    # The allowed count plus four standard deviations.
    assert wrong <= 0.05 * runs + 4 * math.sqrt(0.05 * 0.95 * runs)
    if turns < min_turns(comparisons):
        assert verdicts == {"too few turns"}


def test_a_verdict_needs_nearly_all_rounds_to_agree():
    ours = [10.0] * 10
    result = speedup([20.0] * 10, ours)
    assert (result["ratio"], result["verdict"]) == (2.0, "faster")
    assert speedup([5.0] * 10, ours)["verdict"] == "slower"
    assert speedup([11.0] * 9 + [9.0], ours)["verdict"] == "faster"
    assert speedup([11.0] * 9 + [9.0], ours, 4)["verdict"] == "within the spread"
    assert speedup([11.0] * 8 + [9.0] * 2, ours)["verdict"] == "within the spread"


def test_too_few_rounds_give_a_ratio_without_an_interval():
    result = speedup([20.0] * 5, [10.0] * 5)
    assert result == {"ratio": 2.0, "low": None, "high": None, "verdict": "too few turns"}
    assert compare_medians([20.0] * 5, [10.0] * 6)["verdict"] == "too few turns"


def test_two_runs_differ_only_beyond_both_spreads():
    before = [10.0, 10.1, 9.9, 10.2, 9.8, 10.0]
    same = [10.1, 10.3, 10.0, 10.4, 9.9, 10.2]
    twice = [2 * value for value in before]
    assert compare_medians(before, same)["verdict"] == "within the spread"
    comparison = compare_medians(before, twice)
    assert (comparison["ratio"], comparison["verdict"]) == (pytest.approx(0.5), "worse")
    assert compare_medians(twice, before)["verdict"] == "better"
    comparison = compare_medians(before, twice, more_is_better=True)
    assert (comparison["ratio"], comparison["verdict"]) == (pytest.approx(2.0), "better")
    assert compare_medians(twice, before, more_is_better=True)["verdict"] == "worse"
