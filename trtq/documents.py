"""Text files that come from outside: read whole, bounded, and refused in one line.

Manifests, configurations, recipes, prompts and former results are all read here, so that a pipe without
a writer, ten gigabytes, a hundred thousand brackets or bytes in another encoding are the same error
wherever they are met. A byte-order mark, which editors on Windows write, is accepted.
"""

from __future__ import annotations

import codecs
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trtq.errors import ArtefactError, TrtqError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "MAX_BYTES",
    "SPECIAL_KINDS",
    "check_depth",
    "explain_first",
    "parse_json",
    "read_object",
    "read_text",
    "shown",
]

MAX_BYTES = 64 << 20
"""Of a file of text; the manifest of a model with ten thousand layers has three million."""
MAX_LEVELS = 64
"""Lists and objects inside each other."""
_INT64 = range(-(1 << 63), 1 << 63)
_DIGITS = 19
SPECIAL_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Neither files nor folders, by the format bits of their mode: opening one may wait for ever."""
_KINDS = {stat.S_IFDIR: "a folder"} | SPECIAL_KINDS
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: Any) -> str:
    """A value as a message quotes it: its `repr`, cut where it is long, deep or cannot be written."""
    try:
        return _repr.repr(value)
    except (ValueError, RecursionError):
        # An integer of more digits than Python turns into text.
        return f"a value of type {type(value).__name__}"


def read_text(
    path: Path,
    what: str = "",
    *,
    error: type[TrtqError] = ArtefactError,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The text of a file.

    Args:
        path: the file; a link to one is followed.
        what: what it is to be, for the message, e.g. `the recipe`.
        error: what to raise.
        max_bytes: a larger file is refused unread.

    Returns:
        Its text without a byte-order mark.

    Raises:
        TrtqError: it is missing, no file, too large or not UTF-8; of the class `error`.
    """
    name = f"{what} {path}" if what else str(path)

    def refuse(reason: str, cause: Exception | None = None) -> NoReturn:
        raise error(f"cannot read {name}: {reason}") from cause

    try:
        info = os.stat(path)
        # What a shell hands over as `<(command)` is a pipe with a writer.
        piped = stat.S_ISFIFO(info.st_mode) and path.parts[:2] in (("/", "dev"), ("/", "proc"))
        if not stat.S_ISREG(info.st_mode) and not piped:
            kind = _KINDS.get(stat.S_IFMT(info.st_mode), "no file")
            refuse(f"it is {kind}; give a file")
        if info.st_size > max_bytes:
            refuse(f"it has {info.st_size:,} bytes, at most {max_bytes:,} are read")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except TrtqError:
        raise
    except OSError as err:
        refuse(err.strerror or str(err), err)
    except ValueError as err:
        # A NUL, which the operating system takes for the end of the name.
        refuse(str(err), err)
    if len(content) > max_bytes:
        refuse(f"it has more than the {max_bytes:,} bytes that are read")
    if content.startswith(_UTF16):
        refuse("it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        refuse(f"byte {content[err.start]:#04x} at {err.start} is not UTF-8; save it as UTF-8", err)


@dataclass(frozen=True)
class _Fault:
    """Stands for a number that is not taken, until its key is known."""

    text: str


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value that a JSON text stands for, more strictly than `json.loads`.

    Args:
        text: the text.
        finite: refuse `NaN` and `Infinity`, which are no JSON, and numbers that become infinite.

    Raises:
        ValueError: it is no JSON, gives a key twice, holds a number beyond 64 bits or half a character,
            or is nested more than `MAX_LEVELS` deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for key, value in pairs:
            for fault in value if isinstance(value, list) else (value,):
                if isinstance(fault, _Fault):
                    raise ValueError(f"{shown(key)}: {fault.text}")
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {shown(doubled)} is given twice")
        return found

    # A number is parsed before the key that it belongs to is known.
    def whole(digits: str) -> int | _Fault:
        if len(digits) > _DIGITS + 1 or int(digits) not in _INT64:
            return _Fault(f"the number {shown(digits)} does not fit 64 bits")
        return int(digits)

    def real(digits: str) -> float | _Fault:
        value = float(digits)
        if finite and value in (float("inf"), -float("inf")):
            return _Fault(f"the number {shown(digits)} is too large")
        return value

    def constant(name: str) -> float | _Fault:
        return _Fault(f"{name} is not a valid JSON number") if finite else float(name)

    try:
        found = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=whole,
            parse_float=real,
            parse_constant=constant,
        )
    except RecursionError as err:
        raise ValueError(f"it is nested more than {MAX_LEVELS} levels deep") from err
    check_depth(found)
    faults = [value for value in _leaves(found) if isinstance(value, _Fault)]
    if faults:  # In a list of lists, or without any key.
        raise ValueError(faults[0].text)
    if "\\u" in text and not all(
        _is_text(value) for value in _leaves(found) if isinstance(value, str)
    ):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return found


def check_depth(value: Any, most: int = MAX_LEVELS) -> None:
    """Nothing, if lists and dicts are nested no deeper than `most`.

    Raises:
        ValueError: they are.
    """
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {most} levels deep")


def _leaves(value: Any) -> Iterator[Any]:
    """Keys of objects, and all values that are neither object nor list."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        else:
            yield one


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(
    path: Path,
    what: str = "",
    *,
    error: type[TrtqError] = ArtefactError,
    max_bytes: int = MAX_BYTES,
    finite: bool = True,
) -> dict[str, Any]:
    """The object in a JSON file; arguments as in `read_text` and `parse_json`.

    Raises:
        TrtqError: it cannot be read, is no JSON, or holds something else; of the class `error`.
    """
    name = f"{what} {path}" if what else str(path)
    text = read_text(path, what, error=error, max_bytes=max_bytes)
    try:
        found = parse_json(text, finite=finite)
    except ValueError as err:
        raise error(f"cannot read {name}: {err}") from err
    if not isinstance(found, dict):
        raise error(f"cannot read {name}: it holds no object, but {shown(found)}")
    return found


def explain_first(error: ValidationError) -> str:
    """Pydantic's first complaint in one line, as `place: what is wrong (got value)`."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(shown(p).strip("'\"") for p in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key"
    if problem["type"] in ("missing", "value_error"):
        return f"{place}: {message}" if place else message
    return f"{place}: {message} (got {shown(problem['input'])})"
