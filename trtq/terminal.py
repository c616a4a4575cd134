"""What the command line stands on: streams that take every text, and a width that is one."""

from __future__ import annotations

import codecs
import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Mapping
from typing import TextIO

__all__ = [
    "StderrHandler",
    "internal_error",
    "one_line",
    "open_streams",
    "sane_environment",
    "stop_writing",
]

_REPLACED = "trtq.replaced"
_SPELLED = {
    "…": "...",
    "–": "-",  # noqa: RUF001
    "—": "-",
    "×": "x",  # noqa: RUF001
    "‘": "'",  # noqa: RUF001
    "’": "'",  # noqa: RUF001
    "“": '"',
    "”": '"',
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "µ": "u",  # noqa: RUF001
    "ß": "ss",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_MIN_COLUMNS, _MAX_COLUMNS = 20, 1000
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """What a stream of another encoding gets of a character it has not: its ASCII form or its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = []
    for character in error.object[error.start : error.end]:
        plain = _SPELLED.get(character) or unicodedata.normalize("NFKD", character).encode(
            "ascii", "ignore"
        ).decode("ascii")
        found.append(plain or character.encode("ascii", "backslashreplace").decode("ascii"))
    return "".join(found), error.end


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes log records to what standard error is at the time, and to nothing where it is closed."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if sys.stderr is None or sys.stderr.closed:
            return
        self.stream = sys.stderr
        super().emit(record)


def open_streams() -> None:
    """Make the standard streams fit for use, once, before anything is printed.

    Characters that a stream's encoding has not are spelled in ASCII, so that no text is lost and none is
    an error. Descriptors that were closed lead nowhere, so that no file is opened in their place and
    written to by what prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error(_REPLACED, _replaced)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_REPLACED)


def stop_writing() -> None:
    """Let what is still to be printed go nowhere: nobody reads it, and that is no second error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
    finally:
        os.close(nowhere)


def sane_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment, without a number of columns or lines in which nothing can be shown.

    A terminal that is not attached has 0 of them, and then a table of no width is printed.
    """
    found = dict(os.environ if environment is None else environment)
    for name, least in (("COLUMNS", _MIN_COLUMNS), ("LINES", 1)):
        value = found.get(name)
        if value is None:
            continue
        if re.fullmatch(r"[0-9]{1,6}", value) is None or int(value) < least:
            del found[name]
        else:
            found[name] = str(min(int(value), _MAX_COLUMNS))
    return found


def one_line(text: str) -> str:
    """A text with what moves the cursor, ends a line or turns the direction of writing escaped."""
    return _CONTROL.sub(
        lambda found: found[0].encode("unicode_escape").decode("ascii"), text.strip()
    )


def internal_error(error: Exception, say: Callable[[str], None], *, verbose: bool) -> int:
    """Say in one line what nobody foresaw; the traceback only where it was asked for.

    Args:
        error: not one of trtq's own.
        say: prints a line.
        verbose: print the traceback, too.

    Returns:
        The exit code.
    """
    if verbose:
        sys.stderr.write("".join(traceback.format_exception(error)))
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    text = f"{type(error).__name__}: {first}"
    memory = isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )
    if memory:
        say(
            f"error: out of memory ({text}); choose fewer images, a smaller batch or a smaller size"
        )
    elif isinstance(error, ImportError):
        say(f"error: a module that trtq needs cannot be imported ({text}); see trtq doctor")
    else:
        say(f"internal error: {text}; run with -v for the traceback; this is a bug")
    return 1
