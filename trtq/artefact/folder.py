"""Writing of an artefact's folder: completely, or not at all.

An artefact is written into a hidden folder next to its destination and renamed when it is complete, so a
folder with a manifest is always complete.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from safetensors import SafetensorError

from trtq.artefact.contents import find_strays
from trtq.artefact.files import files_below, is_empty, sha256
from trtq.artefact.listing import Owned, read_listing
from trtq.artefact.locks import claim
from trtq.artefact.manifest import MANIFEST_NAME
from trtq.artefact.manifest_file import checked_path, parse_manifest
from trtq.artefact.outputs import check_place
from trtq.artefact.partial import (
    RESUMABLE,
    has_checkpoint,
    partial_folder,
    remove_partial,
    strip_partial,
)
from trtq.artefact.replace import recover, replace_folder
from trtq.errors import ArtefactError, IntegrityError, UsageError

__all__ = [
    "check_output",
    "check_outside_artefacts",
    "claimed",
    "claims_output",
    "new_artefact",
    "owned_by_trtq",
    "put_in_place",
]

logger = logging.getLogger(__name__)


def owned_by_trtq(folder: Path) -> Owned | None:
    """The files of trtq in a folder, from its manifest or listing; None if it has neither."""
    if not folder.is_dir():
        return None
    if (folder / MANIFEST_NAME).is_file():
        try:
            manifest = parse_manifest(folder)
        except (ArtefactError, RecursionError):
            return None
        return Owned(manifest.kind, manifest.files, MANIFEST_NAME)
    return read_listing(folder)


_WORDS = {
    "run": "a run",
    "onnx": "an ONNX folder",
    "engine": "a folder of engines",
    "eval": "a report of trtq eval",
    "bench": "a report of trtq bench",
    "demo report": "a report of trtq demo",
    "demo": "a folder of trtq demo",
    "triton": "a Triton model repository",
    "comparison": "a comparison of trtq verify",
}
_OTHERS = {
    "triton": "a repository that trtq made",
    "demo": "a folder that trtq demo made",
    "comparison": "a comparison that trtq verify made",
    **dict.fromkeys(("eval", "bench", "demo report"), "a report of trtq"),
}
_OPEN = ("demo",)
"""Kinds of folders that may contain other results."""


def check_output(
    final: Path, *, overwrite: bool, source: str | Path | Any = None, kind: str | None = None
) -> Path:
    """Check an output folder before any long work, and return its absolute path.

    Args:
        final: path of the output folder.
        overwrite: whether an existing folder of trtq may be replaced.
        source: the input; it must neither be replaced nor lie inside a replaced folder.
        kind: kind of the output, see `Owned`; only the same kind is replaced. None: any kind.

    Returns:
        The absolute path.

    Raises:
        UsageError: an existing file or folder must not be replaced, or the path is not writable.
    """
    final = check_place(final, source=source)
    check_outside_artefacts(final)
    if not final.exists() or is_empty(final):
        return final
    if not final.is_dir():
        raise UsageError(f"{final} is a file; --output names a folder here")
    owned = owned_by_trtq(final)
    if owned is None:
        what = _OTHERS.get(kind or "", "an artefact of trtq")
        raise UsageError(f"{final} exists and is not {what}; choose another --output")
    if kind is not None and owned.kind != kind:
        raise UsageError(
            f"{final} exists and is {_word(owned.kind)}, which is not replaced by {_word(kind)}; choose "
            "another --output"
        )
    if not overwrite:
        raise UsageError(f"{final} exists; choose another --output or pass --overwrite")
    _check_own_files(final, owned)
    return final


def _word(kind: str) -> str:
    return _WORDS.get(kind, f"of kind {kind!r}")


def _check_own_files(final: Path, owned: Owned) -> None:
    """Raise unless the listed files are unchanged and a loader would read no other file.

    Raises:
        UsageError: the user changed a file, or added one that a loader of the new artefact would read.
    """
    for name, digest in owned.files.items():
        path = final / name
        try:
            checked_path(final, name)
        except IntegrityError as err:
            raise UsageError(f"{err}; choose another --output") from err
        if digest and path.is_file() and sha256(path) != digest:
            raise UsageError(
                f"{path} was changed since trtq wrote it, and is not replaced; move it away, or choose "
                "another --output"
            )
    if owned.record != MANIFEST_NAME:
        return
    for stray in find_strays(final, owned.files, MANIFEST_NAME):
        if stray.problem is not None:
            raise UsageError(
                f"{final / stray.name} {stray.problem}; move it away before the folder is replaced, or "
                "choose another --output"
            )


def check_outside_artefacts(place: Path) -> None:
    """Raise if a parent folder of a path is an artefact or another result of trtq.

    Raises:
        UsageError: a parent folder is such a result, to which no files may be added.
    """
    for parent in place.resolve().parents:
        around = owned_by_trtq(parent)
        if around is not None and around.kind not in _OPEN:
            raise UsageError(
                f"the output {place} lies inside {parent}, which is {_word(around.kind)}; choose "
                "another --output"
            )


@contextmanager
def claimed(final: Path) -> Iterator[None]:
    """Repair a folder after an interrupted replacement, and hold its lock; see `claim`.

    Raises:
        UsageError: another process is writing to the folder, or the path is not writable.
    """
    check_outside_artefacts(final)
    with claim(final):
        recover(final, owned_by_trtq)
        yield


_P = ParamSpec("_P")
_R = TypeVar("_R")


def claims_output(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that it holds the lock of the folder `out`, an argument, while it runs.

    The function's first argument, unless that is `out`, is its input: neither path may lie inside the
    other. Under `accelerate launch` only the first process holds the lock.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if os.environ.get("RANK", "0") != "0":
            return function(*args, **kwargs)
        first = next(iter(bound.arguments))
        source = None if first == "out" else bound.arguments[first]
        with claimed(check_place(bound.arguments["out"], source=source)):
            return function(*args, **kwargs)

    return alone


def put_in_place(partial: Path, final: Path) -> None:
    """Move a complete folder to its destination; of an earlier folder, only trtq's files are removed."""
    replace_folder(partial, final, owned_by_trtq)


@contextmanager
def new_artefact(
    final: Path,
    *,
    overwrite: bool = False,
    keep_partial: bool = False,
    kind: str | None = None,
) -> Iterator[Path]:
    """Write an artefact next to its destination and move it there if the block ends without an error.

    Args:
        final: destination folder.
        overwrite: replace an existing folder of the same kind.
        keep_partial: keep a partial folder with a checkpoint on an error, and start from an existing
            one; for work that can be resumed.
        kind: kind of the artefact, see `check_output`.

    Yields:
        The folder to write into.

    Raises:
        UsageError: an existing folder must not be replaced, another process is writing to it, or the
            path is not writable.
        ArtefactError: the disk is full, or writing fails.
    """
    final = check_place(final)
    with claimed(final):
        check_output(final, overwrite=overwrite, kind=kind)
        partial = partial_folder(final)
        if not keep_partial or partial.is_symlink() or not partial.is_dir():
            remove_partial(final)
        try:
            partial.mkdir(exist_ok=True)
        except OSError as err:
            raise UsageError(f"cannot write to {final}: {err}") from err
        try:
            yield partial
            put_in_place(partial, final)
        except BaseException as err:
            _give_up(err, partial, final, keep_partial=keep_partial)
            raise


def _give_up(err: BaseException, partial: Path, final: Path, *, keep_partial: bool) -> None:
    """Remove an unfinished artefact, except for checkpoints to resume from.

    Raises:
        ArtefactError: the disk is full, or writing fails.
    """
    newest = _newest_file(partial)
    kept = keep_partial and has_checkpoint(partial)
    what = "nothing of it is left"
    if kept:
        strip_partial(partial)
        what = "its checkpoints are kept; go on with --resume"
        err.add_note(RESUMABLE)
    else:
        try:
            remove_partial(final)
        except UsageError as left:
            logger.warning("%s", left)
    # Usually a full disk, for which safetensors raises a special exception without a file name.
    if isinstance(err, OSError | SafetensorError):
        at = "" if newest is None or newest in str(err) else f"{newest}: "
        raise ArtefactError(f"writing {final} failed, {what}: {at}{err}") from err


def _newest_file(folder: Path) -> str | None:
    """The file that was written last, which is the one that failed."""
    try:
        return max(files_below(folder), key=lambda name: (folder / name).lstat().st_mtime_ns)
    except (OSError, ValueError):
        return None
