"""The TOML file of a call, before the files that it names are read.

This module loads no torch, so that a missing or damaged file is refused at once.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from trtq.documents import check_depth, read_text
from trtq.errors import UsageError

__all__ = ["read_call_file"]

_MAX_BYTES = 1 << 20
_MAX_LEVELS = 16


def read_call_file(path: Path) -> dict[str, Any]:
    """The content of the file.

    Args:
        path: path of the TOML file.

    Raises:
        UsageError: the file cannot be read, or is not TOML.
    """
    text = read_text(path, "the call", error=UsageError, max_bytes=_MAX_BYTES)
    try:
        content = tomllib.loads(text)
        check_depth(content, _MAX_LEVELS)
    except RecursionError as err:
        raise UsageError(f"cannot read the call {path}: it is nested too deep") from err
    except ValueError as err:
        raise UsageError(f"cannot read the call {path}: {err}") from err
    return content
