"""Removal of what a report must not contain: paths, and the names of host and user."""

from __future__ import annotations

import getpass
import re
import socket
from contextlib import suppress
from functools import cache

__all__ = ["without_names"]

_PATHS = (
    re.compile(r"\b[A-Za-z]:[\\/](?:[^\s\\/:*?\"'<>|]+[\\/])*([^\s\\/:*?\"'<>|]*)"),
    re.compile(r"(?<![\w.])(?:~|/)?(?:[\w.@+~-]*/){2,}([\w.@+-]*)"),
    re.compile(r"(?<![\w./])/([\w.@+-]{2,})"),
)
"""Paths of Windows, paths with at least two slashes, and files in the root; the last part is kept."""
_MIN_LENGTH = 2
"""Shorter names are parts of words."""


@cache
def _names() -> tuple[tuple[str, str], ...]:
    names = []
    host = socket.gethostname()
    names += [(host, "<host>"), (host.partition(".")[0], "<host>")]
    with suppress(KeyError, OSError):  # The process has no entry among the users.
        names.append((getpass.getuser(), "<user>"))
    return tuple(pair for pair in names if len(pair[0]) >= _MIN_LENGTH)


def without_names(text: str) -> str:
    """A text without paths, of which the last part stays, and without the names of host and user."""
    for pattern in _PATHS:
        text = pattern.sub(r"\1", text)
    for name, stand_in in _names():
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", stand_in, text, flags=re.IGNORECASE)
    return text
