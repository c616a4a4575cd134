"""Files of a folder: listing, kinds and SHA-256."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trtq.documents import SPECIAL_KINDS

__all__ = ["files_below", "is_empty", "sha256", "special_kind"]

_BOOKKEEPING = frozenset(
    {".DS_Store", ".localized", "Thumbs.db", "desktop.ini", ".directory", ".gitkeep", ".gitignore"}
)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def special_kind(path: Path) -> str | None:
    """Kind of a path that is neither file nor folder, e.g. `a named pipe`; the path is not opened."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return SPECIAL_KINDS.get(stat.S_IFMT(mode))


def files_below(folder: Path) -> Iterator[str]:
    """Relative POSIX paths of all files and links below a folder, sorted.

    Links are not followed.
    """
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            for below in files_below(folder / entry.name):
                yield f"{entry.name}/{below}"
        else:
            yield entry.name


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but files that file managers and git leave in empty folders."""
    return folder.is_dir() and all(path.name in _BOOKKEEPING for path in folder.iterdir())
