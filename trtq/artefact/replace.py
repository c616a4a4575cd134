"""Replacement of a complete folder: only trtq's files are removed, the user's files are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from trtq.artefact.files import files_below, is_empty, sha256
from trtq.artefact.listing import Owned
from trtq.artefact.partial import (
    old_folder,
)
from trtq.errors import UsageError

__all__ = ["recover", "replace_folder"]

logger = logging.getLogger(__name__)

Owner = Callable[[Path], Owned | None]


def recover(final: Path, owned_by: Owner) -> None:
    """Repair a destination after a process died while replacing it.

    Args:
        final: destination folder, whose lock is held.
        owned_by: function that returns trtq's files in a folder.

    Raises:
        UsageError: the user's files are in the way.
    """
    old = old_folder(final)
    if not old.is_dir() or old.is_symlink():
        return
    if not final.exists():
        old.rename(final)
        logger.warning("restored %s: a process died while it replaced it", final)
        return
    left = _retire(old, final, owned_by(old))
    if left:
        raise UsageError(
            f"{old} holds earlier files of {final} that are not trtq's, e.g. {left[0]}; move them away"
        )


def replace_folder(partial: Path, final: Path, owned_by: Owner) -> None:
    """Move a complete folder to its destination; of an earlier folder, only trtq's files are removed.

    The user's files are moved into the new folder. A file whose name is taken there stays in the old
    folder, and a warning names it.

    Args:
        partial: the complete folder.
        final: destination folder, whose lock is held.
        owned_by: function that returns trtq's files in a folder.

    Raises:
        UsageError: the earlier folder does not belong to trtq, or is of another kind.
        OSError: the folder cannot be moved; the earlier folder has been restored.
    """
    if not final.exists():
        partial.rename(final)
        return
    owned = owned_by(final)
    if owned is None and not is_empty(final):
        raise UsageError(f"{final} exists and is not trtq's; choose another --output")
    new = owned_by(partial)
    if owned is not None and new is not None and new.kind != owned.kind:
        raise UsageError(f"{final} is of kind {owned.kind!r}, it is not replaced by a {new.kind!r}")
    old = old_folder(final)
    try:
        final.rename(old)
        partial.rename(final)
    except BaseException:
        if not final.exists():
            old.rename(final)
        raise
    try:
        left = _retire(old, final, owned)
    except OSError as err:
        logger.warning("the earlier files of %s cannot be removed from %s: %s", final, old, err)
        return
    if left:
        logger.warning(
            "%s of the former %s left in %s (changed, or not trtq's and with a name that is taken now): "
            "%s",
            f"{len(left)} file{'s' if len(left) > 1 else ''}",
            final,
            old,
            left[0],
        )


def _retire(old: Path, final: Path, owned: Owned | None) -> list[str]:
    """Remove trtq's files from an old folder, move the others, and return the names of those left."""
    record = old / owned.record if owned is not None else None
    left = list(_retired(old, "", final, owned))
    if left:
        return left
    # The record is removed last, so that another process can finish an interrupted replacement.
    if record is not None:
        record.unlink(missing_ok=True)
    old.rmdir()
    return []


def _retired(old: Path, below: str, final: Path, owned: Owned | None) -> Iterator[str]:
    with os.scandir(old / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}{entry.name}"
        place = old / name
        if owned is not None and name == owned.record:
            continue
        if entry.is_dir(follow_symlinks=False):
            held = owned is not None and any(owned.holds(f"{name}/{n}") for n in files_below(place))
            if not held and not _taken(final / name):
                _move(place, final / name)
                continue
            left = list(_retired(old, f"{name}/", final, owned))
            yield from left
            if not left:
                place.rmdir()
        elif owned is not None and owned.holds(name) and _unchanged(place, name, owned):
            place.unlink()
        elif not _taken(final / name):
            _move(place, final / name)
        else:
            yield name


def _unchanged(path: Path, name: str, owned: Owned) -> bool:
    digest = owned.files.get(name)
    if path.is_symlink() or not path.is_file():
        return False
    return not digest or sha256(path) == digest


def _taken(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
