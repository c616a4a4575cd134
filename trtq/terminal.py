"""Standard streams that accept any text, a usable terminal width, and internal errors as one line."""

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
_ASCII_FORMS = {
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
    """ASCII forms or code points of characters that an encoding lacks; a codec error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    texts = []
    for character in error.object[error.start : error.end]:
        plain = _ASCII_FORMS.get(character) or unicodedata.normalize("NFKD", character).encode(
            "ascii", "ignore"
        ).decode("ascii")
        texts.append(plain or character.encode("ascii", "backslashreplace").decode("ascii"))
    return "".join(texts), error.end


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes log records to the current `sys.stderr`, and discards them if it is closed."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if sys.stderr is None or sys.stderr.closed:
            return
        self.stream = sys.stderr
        super().emit(record)


def open_streams() -> None:
    """Prepare the standard streams, once, before anything is printed.

    Characters that a stream's encoding lacks are written in ASCII, so that no text is lost or raises an
    error. Closed descriptors are connected to the null device; otherwise the next file that is opened
    would take their place and receive what is printed.
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
    """Discard further output to stdout after its reader has gone, so that no second error is raised."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)


def sane_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without unusable values of `COLUMNS` and `LINES`.

    A detached terminal reports 0 columns, which would give every table a width of 0.
    """
    variables = dict(os.environ if environment is None else environment)
    for name, min_value in (("COLUMNS", _MIN_COLUMNS), ("LINES", 1)):
        value = variables.get(name)
        if value is None:
            continue
        if re.fullmatch(r"[0-9]{1,6}", value) is None or int(value) < min_value:
            del variables[name]
        else:
            variables[name] = str(min(int(value), _MAX_COLUMNS))
    return variables


def one_line(text: str) -> str:
    """Escape the characters of a text that move the cursor, end a line or change its direction."""
    return _CONTROL.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), text.strip()
    )


def internal_error(error: Exception, print_line: Callable[[str], None], *, verbose: bool) -> int:
    """Print an unexpected error as one line.

    Args:
        error: an exception that is not a `TrtqError`.
        print_line: function that prints a line.
        verbose: whether to print the traceback too.

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
        print_line(
            f"error: out of memory ({text}); choose fewer images, a smaller batch or a smaller size"
        )
    elif isinstance(error, ImportError):
        print_line(f"error: a module that trtq needs cannot be imported ({text}); see trtq doctor")
    else:
        print_line(f"internal error: {text}; run with -v for the traceback; this is a bug")
    return 1
