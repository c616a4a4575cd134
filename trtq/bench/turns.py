"""Calls in turns: what differs between moments of a machine then touches all that is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["calls_per_turn", "rotated", "take_turns", "time_call", "time_calls"]

TURN_SECONDS = 0.5
MAX_CALLS = 50
_Item = TypeVar("_Item")


def calls_per_turn(call_seconds: float) -> int:
    """How many calls of this length make a turn: about half a second, but 1 .. 50."""
    return max(1, min(MAX_CALLS, round(TURN_SECONDS / max(call_seconds, 1e-6))))


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_calls(call: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each of a number of calls.

    Before them there is one that is not counted: caches and sleeping threads are not the model's. A slow
    model gets it as a fast one does, though its turn then takes twice as long: they are compared.
    """
    call()
    return [time_call(call) for _ in range(calls)]


def rotated(items: list[_Item], turn: int) -> list[_Item]:
    """The items, another one first in every turn, so that none always follows the same one."""
    place = turn % len(items) if items else 0
    return items[place:] + items[:place]


def take_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of single calls in this process, one of each per turn.

    Args:
        calls: what to time, by name.
        turns: calls of each that count.
        warm_up: turns before that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, turns):
        for name in rotated(list(calls), turn):
            taken = time_call(calls[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds
