"""Hidden folders next to a result: one for an unfinished result, one for a result being replaced."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from trtq.artefact.listing import CHECKPOINTS
from trtq.errors import UsageError

__all__ = [
    "RESUMABLE",
    "has_checkpoint",
    "old_folder",
    "partial_folder",
    "remove_partial",
    "strip_partial",
]

RESUMABLE = "its checkpoints are kept; go on from them with --resume"
"""Note of an exception after which the work can be resumed."""


def partial_folder(final: Path) -> Path:
    """Hidden path of a folder until it is complete; the name marks the folder as trtq's."""
    return final.with_name(f".{final.name}.trtq-partial")


def old_folder(final: Path) -> Path:
    """Hidden path of a folder that is being replaced, until the new folder has been moved in."""
    return final.with_name(f".{final.name}.trtq-old")


def remove_partial(final: Path) -> None:
    """Remove the remains of an interrupted process next to a locked destination, see `claim`.

    Raises:
        UsageError: the remains cannot be removed.
    """
    partial = partial_folder(final)
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    if partial.exists() or partial.is_symlink():
        raise UsageError(f"{partial} is in the way and cannot be removed; move it away")


def has_checkpoint(partial: Path) -> bool:
    """Whether a partial folder holds a complete checkpoint to resume from."""
    return any(partial.glob(f"{CHECKPOINTS}/*/iteration-*/checkpoint.json"))


def strip_partial(partial: Path) -> None:
    """Remove everything from a partial folder except complete checkpoints."""
    for path in partial.glob("*"):
        if path.name != CHECKPOINTS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in partial.glob(f"{CHECKPOINTS}/*/.iteration-*"):
        shutil.rmtree(path, ignore_errors=True)
