"""Helpers for one-line messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["list_names", "one_line"]

_MAX_NAMES = 3
_MAX_CHARACTERS = 400


def one_line(err: object) -> str:
    """The message of a library's error as one truncated line."""
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."


def list_names(names: Iterable[str]) -> str:
    """The first few names and the number of the others: `'a', 'b', 'c' and 7 more`."""
    ordered = sorted(names)
    text = ", ".join(repr(name) for name in ordered[:_MAX_NAMES])
    rest = len(ordered) - _MAX_NAMES
    return f"{text} and {rest} more" if rest > 0 else text
