"""Reading the TOML files of a user, and the errors in them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtq.documents import check_depth, read_text, shown
from trtq.errors import RecipeError

__all__ = ["explain", "read_toml"]

_MAX_PROBLEMS = 5
_MAX_BYTES = 256 << 10
_MAX_LEVELS = 16
_MANY_KEYS = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]+[ \t]*\.[ \t]*){100}")
"""A dotted key with 100 or more parts, which would take the parser minutes."""


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file.

    Args:
        path: path of the file.
        what: kind of file, used in messages.

    Raises:
        RecipeError: the file cannot be read or is not TOML.
    """
    text = read_text(path, f"the {what}", error=RecipeError, max_bytes=_MAX_BYTES)
    try:
        if _MANY_KEYS.search(text):
            raise ValueError("a key has more than 100 parts")
        content = tomllib.loads(text)
        check_depth(content, _MAX_LEVELS)
    except RecursionError as err:
        raise RecipeError(f"cannot read the {what} {path}: it is nested too deep") from err
    except ValueError as err:
        # Invalid TOML, or a number with too many digits for Python.
        raise RecipeError(f"cannot read the {what} {path}: {err}") from err
    return content


def explain(error: ValidationError) -> str:
    """The first few errors of a validation, each as `place: message`."""
    problems = error.errors()
    lines = []
    for problem in problems[:_MAX_PROBLEMS]:
        place = ".".join(shown(part).strip("'\"") for part in problem["loc"]) or "the file"
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{place}: {message} (got {shown(problem['input'])})")
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(lines)
