"""Arguments of a pipeline's call in files: `--call FILE.toml` and `--input NAME=FILE`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trtq.calls.call_file import read_call_file
from trtq.calls.input_files import KINDS_OF_FILES, read_file
from trtq.calls.user_call import UserCall
from trtq.documents import shown
from trtq.errors import UsageError

__all__ = ["as_call", "read_call", "read_input", "read_inputs"]

_FILE = "file"
_TENSOR = "tensor"


def read_call(path: str | Path) -> UserCall:
    """The arguments of a call in a TOML file.

    Numbers, texts and lists stand for themselves. A table with the key `file` is the content of a file,
    by a path relative to the TOML file: `image = { file = "cat.png" }`; a list of such tables is a list
    of pictures. A `.safetensors` file with several tensors needs the key `tensor`, too.

    Args:
        path: path of the TOML file.

    Raises:
        UsageError: the file, or a file that it names, is missing or cannot be used.
    """
    path = Path(path)
    content = read_call_file(path)
    return UserCall({name: _value(value, name, path) for name, value in content.items()})


def _value(value: Any, name: str, path: Path) -> Any:
    """The value of an argument.

    Args:
        value: value in the TOML file.
        name: name of the argument, with the keys inside it.
        path: path of the TOML file.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} in {path} is {value}; give a finite number")
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_value(item, f"{name}.{index}", path) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        raise UsageError(
            f"{name} in {path} is a {type(value).__name__}; give a number, a text, a list, or "
            '{ file = "NAME" }'
        )
    if _FILE not in value:
        return {key: _value(item, f"{name}.{key}", path) for key, item in value.items()}
    unknown = [key for key in value if key not in (_FILE, _TENSOR)]
    if unknown or not all(isinstance(item, str) for item in value.values()):
        problem = f"the unknown key {shown(unknown[0])}" if unknown else "a value that is no text"
        raise UsageError(
            f'{name} in {path} has {problem}; write {{ file = "NAME" }}, with tensor = "NAME" for a '
            ".safetensors file with several tensors"
        )
    argument = name.partition(".")[0]
    return read_file(path.parent / value[_FILE], argument, value.get(_TENSOR))


def read_input(text: str) -> tuple[str, Any]:
    """The argument of a call that `--input NAME=FILE` gives.

    Args:
        text: `NAME=FILE`.

    Returns:
        Name and value of the argument.

    Raises:
        UsageError: the text has another form, or the file cannot be used.
    """
    name, equals, place = text.partition("=")
    if not equals or not name.isidentifier() or not place:
        raise UsageError(f"--input takes NAME=FILE, e.g. image=cat.png; got {shown(text)}")
    path = Path(place)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        raise UsageError(
            f"--input {name}: there is no file {shown(place)}; --input takes {KINDS_OF_FILES}; numbers "
            "and texts belong in a file for --call FILE.toml"
        )
    return name, read_file(path, name)


def read_inputs(texts: Iterable[str]) -> Mapping[str, Any]:
    """The arguments of several `--input`.

    Raises:
        UsageError: see `read_input`; an argument is given twice.
    """
    inputs: dict[str, Any] = {}
    for text in texts:
        name, value = read_input(text)
        if name in inputs:
            raise UsageError(
                f"--input gives {name!r} twice; a list of files belongs in a file for --call FILE.toml: "
                f'{name} = [{{ file = "A.png" }}, {{ file = "B.png" }}]'
            )
        inputs[name] = value
    return inputs


def as_call(call: str | Path | Mapping[str, Any] | UserCall | None) -> UserCall:
    """A call from a TOML file, a dict of arguments or a `UserCall`; None: no arguments."""
    if call is None:
        return UserCall()
    if isinstance(call, UserCall):
        return call
    return UserCall(dict(call)) if isinstance(call, Mapping) else read_call(call)
