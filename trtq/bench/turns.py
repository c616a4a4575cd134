"""Interleaved timing rounds, so that load changes on the machine affect all compared calls alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["calls_per_turn", "rotated", "take_turns", "time_call", "time_calls"]

TURN_SECONDS = 0.5
MAX_CALLS = 50
_Item = TypeVar("_Item")


def calls_per_turn(call_seconds: float) -> int:
    """Number of calls in one round of about half a second, between 1 and 50."""
    return max(1, min(MAX_CALLS, round(TURN_SECONDS / max(call_seconds, 1e-6))))


def time_call(call: Callable[[], object]) -> float:
    """Duration of one call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_calls(call: Callable[[], object], calls: int) -> list[float]:
    """Duration of each of `calls` calls in seconds.

    One uncounted call runs first to warm up caches and threads. Slow models get this call, too,
    although it doubles the duration of a round: all compared models are treated alike.
    """
    call()
    return [time_call(call) for _ in range(calls)]


def rotated(items: list[_Item], turn: int) -> list[_Item]:
    """The items in cyclic order, starting with a different item in each round."""
    place = turn % len(items) if items else 0
    return items[place:] + items[:place]


def take_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time single calls in this process, one call of each name per round.

    Args:
        calls: callables by name.
        turns: number of counted rounds.
        warm_up: number of uncounted rounds before them.

    Returns:
        Seconds per round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, turns):
        for name in rotated(list(calls), turn):
            duration = time_call(calls[name])
            if turn >= 0:
                seconds[name].append(duration)
    return seconds
