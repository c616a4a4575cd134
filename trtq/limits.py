"""Upper bounds of numbers in user input: larger numbers are rejected before any work.

The bounds are not limits of the methods. Each lies well beyond practical values and far below the limits
of memory, 64-bit integers or acceptable run time, so that a typing error is reported at once.
"""

from __future__ import annotations

import re

__all__ = [
    "MAX_BATCH",
    "MAX_GUIDANCE",
    "MAX_IMAGES",
    "MAX_ITERATIONS",
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_STEPS",
    "MAX_THREADS",
    "NOT_SCALED",
    "OUTLIER_RATIO",
    "parse_whole",
]

MAX_IMAGES = 100_000
"""Images per evaluation or generation."""
MAX_SIDE = 8192
"""Height or width of an image, in pixels."""
MAX_STEPS = 1000
"""Denoising steps; the schedules of diffusion models have 1000."""
MAX_GUIDANCE = 1000.0
"""Classifier-free guidance scale; practical values are 1 .. 20."""
MAX_BATCH = 4096
"""Images or rows per call."""
MAX_ITERATIONS = 10_000_000
"""Iterations of the optimiser."""
MAX_SEED = 2**31 - 1
"""Random seed on the command line."""
MAX_THREADS = 1024
"""Threads per operator."""

OUTLIER_RATIO = 20.0
"""Largest channel over median channel of a layer's input that is reported."""
NOT_SCALED = "channels not scaled: "
"""What precedes the obstacle in the reason of an attention product whose channels stay as they are."""

_WHOLE = re.compile(r"[0-9]{1,18}")


def parse_whole(text: str) -> int:
    """Parse a whole number of at most 18 plain digits; unlike `int`, without sign, space or underscore.

    Raises:
        ValueError: the text is not such a number.
    """
    if _WHOLE.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)
