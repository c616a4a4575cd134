"""Progress reporting for long-running work.

Library functions take a `ProgressCallback` and call it. The command line passes one that prints to
standard error: a bar on a terminal, a line every ten seconds elsewhere.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Protocol, TextIO

__all__ = ["ProgressCallback", "ProgressPrinter", "silent"]


class ProgressCallback(Protocol):
    """Called with the stage's name, the work done and the total."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress."""


def silent(stage: str, done: int, total: int) -> None:
    """A `ProgressCallback` that prints nothing."""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class ProgressPrinter:
    """Prints `stage done/total, time left`: rewritten in place on a terminal, else every ten seconds.

    Args:
        stream: output stream; default: standard error.
        interval_s: seconds between lines, unless the stream is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, interval_s: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        # A dumb terminal prints escape sequences verbatim.
        dumb = os.environ.get("TERM", "") == "dumb"
        self.terminal = self.stream is not None and self.stream.isatty() and not dumb
        self.interval_s = 0.1 if self.terminal else interval_s
        self._stage = ""
        self._first = (0.0, 0)
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print, unless the last line was printed less than an interval ago."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._last = stage, (now, done - 1), -1e9
        finished = done >= total
        if now - self._last < self.interval_s and not finished:
            return
        self._last = now
        start, start_done = self._first
        elapsed = now - start
        if finished:
            text = f"{stage}: {total}/{total} in {_duration(elapsed)}"
        elif elapsed > 0 and done > start_done + 1:
            left = elapsed / (done - start_done - 1) * (total - done)
            text = f"{stage}: {done}/{total}, {_duration(left)} left"
        else:
            text = f"{stage}: {done}/{total}"
        if self.terminal:
            text = f"\r\x1b[K{text}" + ("\n" if finished else "")
        else:
            text += "\n"
        # The work continues when its progress cannot be printed: a closed pipe, a full disk.
        with suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.write(text)
                self.stream.flush()
