"""Interleaved timing rounds."""

import pytest

from trtq.bench.turns import calls_per_turn, rotated, take_turns, time_calls


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 50), (0.05, 10), (0.4, 1), (30.0, 1)])
def test_a_round_takes_half_a_second(seconds, calls):
    assert calls_per_turn(seconds) == calls


@pytest.mark.parametrize("calls", [1, 3])
def test_does_not_count_the_first_call_of_a_round(calls):
    done = []
    assert len(time_calls(lambda: done.append(1), calls)) == calls
    assert len(done) == calls + 1


def test_rounds_interleave_and_rotate_the_first_call():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = take_turns(calls, 3, warm_up=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert rotated([], 3) == []
