"""Checks of output paths, and writing of single files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trtq.artefact.files import special_kind
from trtq.artefact.locks import claim
from trtq.artefact.partial import (
    partial_folder,
    remove_partial,
)
from trtq.errors import ArtefactError, UsageError

__all__ = ["check_file", "check_place", "new_file"]


def check_place(place: str | Path, *, source: Any = None) -> Path:
    """Raise if writing to a path would do harm, and return its absolute form.

    Args:
        place: path of a file or folder.
        source: path of the input, or the opened input; neither path may lie inside the other.

    Returns:
        The absolute path.

    Raises:
        UsageError: the path is a link, is neither file nor folder, is the root, the user's home, the
            current folder or one of its parents, or a mount point, or overlaps with the input.
    """
    path = Path(place)
    if "\0" in str(path):
        raise UsageError(f"the output {str(path)!r} holds a NUL; choose another --output")
    if path.parts and path.parts[0].startswith("~"):
        raise UsageError(
            f"the output {str(path)!r} begins with ~, which no shell has filled in; write the path out"
        )
    try:
        linked = path.is_symlink()
        final = path.resolve()
        here = Path.cwd()
    except (OSError, RuntimeError) as err:
        raise UsageError(f"cannot write to {path}: {err}; choose another --output") from err
    if linked:
        raise UsageError(
            f"the output {path} is a symbolic link to {final}; a link is not replaced; give the "
            "path of the folder itself"
        )
    if final == here or final in here.parents:
        raise UsageError(
            f"the output {final} is the current folder or a folder that contains it; give a new "
            "folder, e.g. --output result"
        )
    with suppress(RuntimeError):
        if final == Path.home() or final in Path.home().parents:
            raise UsageError(
                f"the output {final} is your home folder or a folder that contains it; give a new "
                "folder in your home folder"
            )
    kind = special_kind(final)
    if kind is not None:
        raise UsageError(f"the output {final} is {kind}; choose another --output")
    if final.is_dir() and os.path.ismount(final):
        raise UsageError(
            f"the output {final} is a mount point, which cannot be replaced; give a new folder in it, "
            f"e.g. {final / 'result'}"
        )
    source = getattr(source, "place", source)  # Use the path of an opened artefact.
    if isinstance(source, str | Path):
        try:
            there = Path(source).exists()
        except (OSError, ValueError):  # Not a valid path: too long, or with a NUL.
            there = False
        if there:
            _check_apart(final, Path(source).resolve())
    return final


def _check_apart(final: Path, source: Path) -> None:
    same = final.exists() and final.samefile(source)
    if same or source == final or final in source.parents or source in final.parents:
        raise UsageError(
            f"the output {final} and the input {source} are the same place or inside each other; choose "
            "another --output"
        )


def check_file(path: str | Path, *, overwrite: bool, source: Any = None) -> Path:
    """Check the path of an output file before any long work, and return its absolute form.

    Args:
        path: path of the file.
        overwrite: whether an existing file may be replaced.
        source: path of the input, or the opened input; neither path may lie inside the other.

    Returns:
        The absolute path.

    Raises:
        UsageError: the folder does not exist, or an existing file must not be replaced.
    """
    given = Path(path)
    final = check_place(given, source=source)
    if not final.parent.is_dir():
        raise UsageError(
            f"the folder {given.parent} does not exist; make it, or choose another one"
        )
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {final.parent}: no permission; choose another --output")
    if final.is_dir():
        raise UsageError(f"{given} is a folder; --output names a file here")
    if final.exists() and not overwrite:
        raise UsageError(f"{given} exists; choose another --output or pass --overwrite")
    return final


@contextmanager
def new_file(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Write a file next to its destination and move it there if the block ends without an error.

    Args:
        path: destination of the file.
        overwrite: whether an existing file may be replaced.

    Yields:
        The path to write to.

    Raises:
        UsageError: see `check_file`.
        ArtefactError: the disk is full, or writing fails.
    """
    final = check_file(path, overwrite=overwrite)
    with claim(final):
        partial = partial_folder(final)
        remove_partial(final)
        try:
            yield partial
            # Another process may have created the destination in the meantime.
            check_file(path, overwrite=overwrite)
            partial.replace(final)
        except OSError as err:
            raise ArtefactError(f"writing {final} failed, nothing of it is left: {err}") from err
        finally:
            partial.unlink(missing_ok=True)
