"""Quantiles, intervals and verdicts."""

import math

import numpy as np
import pytest

from trtq.bench.summary import compare_medians, median_interval, quantile, speedup, summarize


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).standard_normal(101).tolist()
    for share in (0, 0.25, 0.5, 0.9, 0.99, 1):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_a_summary_is_in_milliseconds_and_keeps_the_turns():
    found = summarize([[0.001, 0.003], [0.002]])
    assert (found["p50"], found["calls"]) == (2.0, 3)
    assert found["turns"] == [2.0, 2.0]


@pytest.mark.parametrize(("count", "skipped"), [(2, 0), (5, 0), (6, 0), (9, 1), (10, 1), (20, 5)])
def test_the_interval_of_the_median_has_its_confidence(count, skipped):
    values = list(range(count))
    low, high = median_interval(values)
    assert (low, high) == (skipped, count - 1 - skipped)
    missed = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
    assert missed <= 0.05 or skipped == 0


def test_faster_only_when_nearly_all_turns_say_so():
    ours = [10.0] * 10
    found = speedup([20.0] * 10, ours)
    assert (found["ratio"], found["verdict"]) == (2.0, "faster")
    assert speedup([5.0] * 10, ours)["verdict"] == "slower"
    assert speedup([11.0] * 9 + [9.0], ours)["verdict"] == "faster"
    assert speedup([11.0] * 8 + [9.0] * 2, ours)["verdict"] == "within the spread"


def test_two_runs_differ_only_beyond_the_spread_of_both():
    before = [10.0, 10.1, 9.9, 10.2, 9.8, 10.0]
    same = [10.1, 10.3, 10.0, 10.4, 9.9, 10.2]
    assert compare_medians(before, same)["verdict"] == "within the spread"
    found = compare_medians(before, [2 * value for value in before])
    assert (found["ratio"], found["verdict"]) == (pytest.approx(0.5), "slower")
    assert compare_medians(before, [value / 2 for value in before])["verdict"] == "faster"
