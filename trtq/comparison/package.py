"""The installed polygraphy: its version, its messages and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from trtq._optional import require
from trtq.errors import MissingDependencyError, UsageError

__all__ = ["MIN_VERSION", "check_polygraphy", "quiet_polygraphy"]

MIN_VERSION = (0, 53, 6)
"""First version that was tried; earlier ones have other results and comparison functions."""


def check_polygraphy() -> None:
    """Raise unless a polygraphy that trtq can use is installed.

    Raises:
        MissingDependencyError: polygraphy is missing or too old; the message says how to install it.
    """
    require("polygraphy")
    version = metadata.version("polygraphy")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise MissingDependencyError(
            f"polygraphy {version} is installed, and trtq needs {needed} or later: "
            "pip install -U 'trtq[polygraphy]'"
        )


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Inside the block polygraphy prints nothing, and its errors are one line.

    Raises:
        UsageError: polygraphy refuses what it was given.
    """
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            yield
        except PolygraphyException as err:
            raise UsageError(
                f"polygraphy cannot compare them: {' '.join(str(err).split())}"
            ) from err
