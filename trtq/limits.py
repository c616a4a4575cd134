"""The most that a number from outside may be: a larger one is refused before anything is made of it.

None of them is a limit of the methods. Each lies well beyond what a model of today is used with, and far
below where memory, 64-bit integers or patience end, so that a slip of the keyboard is told at once.
"""

from __future__ import annotations

import re

__all__ = [
    "MAX_BATCH",
    "MAX_GUIDANCE",
    "MAX_IMAGES",
    "MAX_ITERATIONS",
    "MAX_SIDE",
    "MAX_STEPS",
    "MAX_THREADS",
    "parse_whole",
]

MAX_IMAGES = 100_000
"""Images of one evaluation or drawing."""
MAX_SIDE = 8192
"""Height or width of an image in pixels."""
MAX_STEPS = 1000
"""Denoising steps; the schedules of diffusion models have as many."""
MAX_GUIDANCE = 1000.0
"""Classifier-free guidance; models are used with 1 .. 20."""
MAX_BATCH = 4096
"""Images or rows in one call."""
MAX_ITERATIONS = 10_000_000
"""Optimiser steps."""
MAX_THREADS = 1024
"""Threads of one operator."""

_WHOLE = re.compile(r"[0-9]{1,18}")


def parse_whole(text: str) -> int:
    """A whole number of at most 18 plain digits; unlike `int` no sign, space or underscore.

    Raises:
        ValueError: it is none.
    """
    if _WHOLE.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no whole number")
    return int(text)
