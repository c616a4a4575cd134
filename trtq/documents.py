"""Reading of untrusted text files: bounded in size, strict, with one-line errors.

All manifests, configurations, recipes, prompts and earlier results are read here. A pipe without a
writer, ten gigabytes, a hundred thousand brackets or another encoding give the same error everywhere. A
byte-order mark, which editors on Windows write, is accepted.
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
"""Maximum size of a text file, in bytes; the manifest of a model with ten thousand layers has 3 MB."""
MAX_LEVELS = 64
"""Maximum nesting depth of lists and objects."""
_INT64 = range(-(1 << 63), 1 << 63)
_DIGITS = 19
SPECIAL_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Names of special files by the format bits of their mode; opening such a file may block forever."""
_KINDS = {stat.S_IFDIR: "a folder"} | SPECIAL_KINDS
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: Any) -> str:
    """The `repr` of a value for a message, shortened if it is long or deeply nested."""
    try:
        return _repr.repr(value)
    except (ValueError, RecursionError):
        # E.g. an integer with more digits than Python converts to text.
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
        path: path of a file or of a link to a file.
        what: role of the file in the message, e.g. `the recipe`.
        error: class of the error to raise.
        max_bytes: maximum size in bytes; a larger file is not read.

    Returns:
        Text without a byte-order mark.

    Raises:
        TrtqError: the file is missing, irregular, too large, or not UTF-8; its class is `error`.
    """
    name = f"{what} {path}" if what else str(path)

    def refuse(reason: str, cause: Exception | None = None) -> NoReturn:
        raise error(f"cannot read {name}: {reason}") from cause

    try:
        info = os.stat(path)
        # A shell passes `<(command)` as a pipe with a writer.
        piped = stat.S_ISFIFO(info.st_mode) and path.parts[:2] in (("/", "dev"), ("/", "proc"))
        if not stat.S_ISREG(info.st_mode) and not piped:
            kind = _KINDS.get(stat.S_IFMT(info.st_mode), "not a regular file")
            refuse(f"it is {kind}; give a regular file")
        if info.st_size > max_bytes:
            refuse(f"it has {info.st_size:,} bytes; at most {max_bytes:,} are allowed")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except TrtqError:
        raise
    except OSError as err:
        refuse(err.strerror or str(err), err)
    except ValueError as err:
        # The name holds a NUL, which ends it for the operating system.
        refuse(str(err), err)
    if len(content) > max_bytes:
        refuse(f"it has more than {max_bytes:,} bytes; at most {max_bytes:,} are allowed")
    if content.startswith(_UTF16):
        refuse("it is UTF-16; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        refuse(
            f"byte {content[err.start]:#04x} at offset {err.start} is not UTF-8; save the file as UTF-8",
            err,
        )


@dataclass(frozen=True)
class _Fault:
    """Placeholder of an invalid number until its key is known."""

    text: str


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object's pairs; raises `ValueError` for a repeated key or an invalid number."""
    entries = dict(pairs)
    for key, value in pairs:
        for fault in value if isinstance(value, list) else (value,):
            if isinstance(fault, _Fault):
                raise ValueError(f"{shown(key)}: {fault.text}")
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(duplicate)} is given twice")
    return entries


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parse JSON more strictly than `json.loads`.

    Args:
        text: JSON text.
        finite: whether to refuse `NaN` and `Infinity`, which are not JSON, and numbers that overflow.

    Returns:
        The parsed value.

    Raises:
        ValueError: the text is not JSON, repeats a key, holds a number beyond 64 bits or a lone
            surrogate, or is nested more than `MAX_LEVELS` deep.
    """

    # A number is parsed before its key is known.
    def whole(digits: str) -> int | _Fault:
        if len(digits) > _DIGITS + 1 or int(digits) not in _INT64:
            return _Fault(f"the number {shown(digits)} does not fit 64 bits")
        return int(digits)

    def real(digits: str) -> float | _Fault:
        number = float(digits)
        if finite and number in (float("inf"), -float("inf")):
            return _Fault(f"the number {shown(digits)} is too large")
        return number

    def constant(name: str) -> float | _Fault:
        return _Fault(f"{name} is not a valid JSON number") if finite else float(name)

    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=whole,
            parse_float=real,
            parse_constant=constant,
        )
    except RecursionError as err:
        raise ValueError(f"it is nested more than {MAX_LEVELS} levels deep") from err
    check_depth(value)
    faults = [leaf for leaf in _leaves(value) if isinstance(leaf, _Fault)]
    if faults:  # The number is in a list of lists, or has no key.
        raise ValueError(faults[0].text)
    if "\\u" in text and not all(
        _is_text(leaf) for leaf in _leaves(value) if isinstance(leaf, str)
    ):
        raise ValueError("it contains half of a surrogate pair, which is not a character")
    return value


def check_depth(value: Any, max_levels: int = MAX_LEVELS) -> None:
    """Raise unless lists and dicts are nested at most `max_levels` deep.

    Raises:
        ValueError: the nesting is deeper.
    """
    level = [value]
    for _ in range(max_levels + 1):
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {max_levels} levels deep")


def _leaves(value: Any) -> Iterator[Any]:
    """The keys of all objects, and all values that are neither objects nor lists."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        else:
            yield item


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
    """The object in a JSON file; see `read_text` and `parse_json` for the arguments.

    Raises:
        TrtqError: the file cannot be read, is not JSON, or holds no object; its class is `error`.
    """
    name = f"{what} {path}" if what else str(path)
    text = read_text(path, what, error=error, max_bytes=max_bytes)
    try:
        document = parse_json(text, finite=finite)
    except ValueError as err:
        raise error(f"cannot read {name}: {err}") from err
    if not isinstance(document, dict):
        raise error(f"cannot read {name}: it must hold a JSON object, got {shown(document)}")
    return document


def explain_first(error: ValidationError) -> str:
    """The first of pydantic's errors in one line: `place: problem (got value)`."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(shown(p).strip("'\"") for p in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key"
    if problem["type"] in ("missing", "value_error"):
        return f"{place}: {message}" if place else message
    return f"{place}: {message} (got {shown(problem['input'])})"
