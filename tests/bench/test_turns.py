"""Calls in turns."""

import pytest

from trtq.bench.turns import calls_per_turn, rotated, take_turns, time_calls


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 50), (0.05, 10), (0.4, 1), (30.0, 1)])
def test_a_turn_is_half_a_second_of_calls(seconds, calls):
    assert calls_per_turn(seconds) == calls


@pytest.mark.parametrize("calls", [1, 3])
def test_the_first_call_of_a_turn_is_not_counted_be_the_model_slow_or_fast(calls):
    done = []
    assert len(time_calls(lambda: done.append(1), calls)) == calls
    assert len(done) == calls + 1


def test_turns_interleave_and_begin_with_another_each_time():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = take_turns(calls, 3, warm_up=1)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert rotated([], 3) == []
