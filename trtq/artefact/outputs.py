"""Places that trtq writes to: whose they are, who writes there now, and how a result gets there.

A result is written beside its place, under a hidden name, and renamed when it is complete. A folder of
trtq says which files are its own, each with its SHA-256: an artefact in its manifest, everything else in
`trtq-files.json`. Only such a folder is replaced, and only those files are removed with it; whatever
else lies there is the user's and stays where it is. While a process writes to a place it holds a lock
beside it, which the system lets go of when the process ends in whatever way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trtq.documents import SPECIAL_KINDS, read_object
from trtq.errors import ArtefactError, UsageError

__all__ = [
    "CHECKPOINTS",
    "LISTING_NAME",
    "RESUMABLE",
    "Owned",
    "check_file",
    "check_place",
    "claim",
    "files_below",
    "has_checkpoint",
    "is_empty",
    "new_file",
    "old_folder",
    "partial_folder",
    "read_listing",
    "recover",
    "remove_partial",
    "replace_folder",
    "sha256",
    "special_kind",
    "strip_partial",
    "write_listing",
]

logger = logging.getLogger(__name__)

LISTING_NAME = "trtq-files.json"
"""Names the files of a folder of ours that is no artefact: a report, a Triton repository, a demo."""
LISTING_VERSION = 1
CHECKPOINTS = "checkpoints"
"""Folder of a run that is being made; its files are in no manifest, so that they can be deleted."""
RESUMABLE = "its checkpoints are kept; go on from them with --resume"
"""Note of an exception that ended something that can be gone on with."""
_CHECKPOINT_FILE = re.compile(
    rf"{CHECKPOINTS}/[^/]+/\.?iteration-\d+(\.partial)?/"
    r"(checkpoint\.json|model\.safetensors|process-\d+-of-\d+\.safetensors)"
)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_BOOKKEEPING = frozenset(
    {".DS_Store", ".localized", "Thumbs.db", "desktop.ini", ".directory", ".gitkeep", ".gitignore"}
)
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
_UNLOCKED_BYTE = 1 << 20
_TRIES = 50


@dataclass(frozen=True)
class Owned:
    """What is trtq's in a folder.

    Attributes:
        kind: what the folder is: `run`, `onnx`, `engine`, or one of those that `write_listing` wrote.
        files: SHA-256 by relative POSIX path; empty of a file that is trtq's whatever it holds.
        record: name of the file that says so; trtq's, too.
    """

    kind: str
    files: dict[str, str]
    record: str

    def holds(self, relative: str) -> bool:
        """Whether a file is trtq's by its name."""
        return (
            relative in self.files
            or relative == self.record
            or _CHECKPOINT_FILE.fullmatch(relative) is not None
        )


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def special_kind(path: Path) -> str | None:
    """What a path is that is neither file nor folder, e.g. `a named pipe`; it is not opened."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return SPECIAL_KINDS.get(stat.S_IFMT(mode))


def files_below(folder: Path) -> Iterator[str]:
    """Relative POSIX paths of everything below a folder that is no folder, sorted.

    Links are not followed.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            for below in files_below(folder / entry.name):
                yield f"{entry.name}/{below}"
        else:
            yield entry.name


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what file managers and git leave in empty ones."""
    return folder.is_dir() and all(path.name in _BOOKKEEPING for path in folder.iterdir())


def read_listing(folder: Path) -> Owned | None:
    """What `write_listing` wrote; None where there is no valid listing of ours."""
    try:
        found = read_object(folder / LISTING_NAME)
    except ArtefactError:
        return None
    if found.get("trtq_listing") != LISTING_VERSION:
        return None
    kind, files = found.get("kind"), found.get("files")
    if not isinstance(kind, str) or not isinstance(files, dict):
        return None
    if not all(isinstance(digest, str) for digest in files.values()):
        return None
    return Owned(kind, files, LISTING_NAME)


def write_listing(
    folder: Path, kind: str, names: Sequence[str] | None = None, *, unhashed: Sequence[str] = ()
) -> None:
    """Say which files of a folder are trtq's.

    Args:
        folder: where they lie.
        kind: what the folder is.
        names: of the files; None: all that are there.
        unhashed: those that are still to come.
    """
    chosen = list(files_below(folder)) if names is None else names
    files = {name: sha256(folder / name) for name in chosen if name != LISTING_NAME}
    files |= dict.fromkeys(unhashed, "")
    record = {"trtq_listing": LISTING_VERSION, "kind": kind, "files": files}
    text = json.dumps(record, indent=2) + "\n"
    partial = folder / f".{LISTING_NAME}.trtq-partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / LISTING_NAME)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_folder(final: Path) -> Path:
    """Where a folder is written until it is complete; hidden, and named so that it is ours."""
    return final.with_name(f".{final.name}.trtq-partial")


def old_folder(final: Path) -> Path:
    """Where a folder that is being replaced waits until the new one is in its place."""
    return final.with_name(f".{final.name}.trtq-old")


def _lock_file(final: Path) -> Path:
    return final.with_name(f".{final.name}.trtq-lock")


def check_place(place: str | Path, *, source: Any = None) -> Path:
    """Refuse a place where nothing can be written without harm; its absolute path is given back.

    Args:
        place: of a file or folder.
        source: what is read, if it is a path: the place must not be it, in it or around it.

    Raises:
        UsageError: it is a link, neither file nor folder, the root, the user's home, the current folder
            or one around it, a mount point, or in each other's way with the source.
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
            f"the output {path} is a symbolic link to {final}; a link is not replaced, give the place "
            "itself"
        )
    if final == here or final in here.parents:
        raise UsageError(
            f"the output {final} is the current folder or one around it; give a new folder, e.g. "
            "--output result"
        )
    with suppress(RuntimeError):
        if final == Path.home() or final in Path.home().parents:
            raise UsageError(
                f"the output {final} is your home folder or one around it; give a new folder in it"
            )
    kind = special_kind(final)
    if kind is not None:
        raise UsageError(f"the output {final} is {kind}; choose another --output")
    if final.is_dir() and os.path.ismount(final):
        raise UsageError(
            f"the output {final} is a mount point, which cannot be replaced; give a new folder in it, "
            f"e.g. {final / 'result'}"
        )
    source = getattr(source, "place", source)  # What an opened artefact was opened from.
    if isinstance(source, str | Path):
        try:
            there = Path(source).exists()
        except (OSError, ValueError):  # No path at all: too long, or with a NUL.
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
    """Refuse the place of a single file before any long work; its absolute path is given back.

    Raises:
        UsageError: the folder is not there, or something is there already that must not be replaced.
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
    """Write a file beside its place and move it there when the block ends well.

    Yields:
        The path to write to.

    Raises:
        UsageError: see `check_file`.
        ArtefactError: the disk is full, or fails.
    """
    final = check_file(path, overwrite=overwrite)
    with claim(final):
        partial = partial_folder(final)
        remove_partial(final)
        try:
            yield partial
            # Something may have come there while this one was made.
            check_file(path, overwrite=overwrite)
            partial.replace(final)
        except OSError as err:
            raise ArtefactError(f"writing {final} failed, nothing of it is left: {err}") from err
        finally:
            partial.unlink(missing_ok=True)


_held = threading.local()


@contextmanager
def claim(final: Path) -> Iterator[None]:
    """Be the only one that writes to a place, inside the block; the same thread may claim it again.

    Args:
        final: the place, absolute; folders around it that are missing are made, and go again if nothing
            comes to lie in them.

    Raises:
        UsageError: another process or thread writes there, or nobody can.
    """
    places: set[Path] = _held.__dict__.setdefault("places", set())
    if final in places:
        yield
        return
    made = _make_parents(final)
    try:
        lock = _Lock(final)
        places.add(final)
        try:
            yield
        finally:
            places.discard(final)
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _make_parents(final: Path) -> list[Path]:
    """Make the folders around a place; the new ones, innermost first."""
    missing = [folder for folder in final.parents if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.insert(0, folder)
    except OSError as err:
        for folder in made:
            folder.rmdir()
        raise UsageError(f"cannot write to {final}: {err}; choose another --output") from err
    return made


class _Lock:
    """A lock on a place, in a hidden file beside it that says who holds it.

    Raises:
        UsageError: somebody else holds it, or the file cannot be made.
    """

    def __init__(self, final: Path) -> None:
        self._path = _lock_file(final)
        for _ in range(_TRIES):
            try:
                self._file = os.open(self._path, _LOCK_FLAGS, 0o666)
            except OSError as err:
                raise UsageError(
                    f"cannot write to {final}: {err}; choose another --output"
                ) from err
            ours = _try_lock(self._file)
            if ours is None:  # A file system without locks: what is written in the file must do.
                ours = not _lives(_read_owner(self._path))
            if not ours:
                owner = _read_owner(self._path)
                os.close(self._file)
                raise UsageError(
                    f"{_told(owner)} is writing to {final}; wait until it ends, or choose another "
                    "--output"
                )
            if self._still_there():
                break
            # The one before has ended, and taken the file away between opening and locking it.
            os.close(self._file)
        else:
            raise UsageError(f"cannot lock {final}: {self._path} keeps being removed")
        # A full disk: the lock holds all the same, and what is written will fail with its own message.
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(_me()).encode())

    def _still_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def release(self) -> None:
        """Take the file away and let go."""
        # While it is locked, where that is possible: whoever opened it before sees that it is gone.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        if sys.platform == "win32":
            with suppress(OSError):
                self._path.unlink()


def _try_lock(file: int) -> bool | None:
    """Lock an open file: whether it is ours now; None where the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _UNLOCKED_BYTE, os.SEEK_SET)  # What is locked there cannot be read.
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        return None if err.errno in _NO_LOCKS else False
    return True


def _start_of(pid: int) -> str | None:
    """When a process was started, as the system counts; None where it does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _me() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "start": _start_of(pid), "since": now}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock file is alive; of another machine's, nobody knows: yes."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return _start_of(pid) == owner.get("start")


def _told(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def remove_partial(final: Path) -> None:
    """Remove what a dead process left of a place that is ours now, see `claim`.

    Raises:
        UsageError: it cannot be removed.
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
    """Whether a partial folder holds a complete checkpoint to go on from."""
    return any(partial.glob(f"{CHECKPOINTS}/*/iteration-*/checkpoint.json"))


def strip_partial(partial: Path) -> None:
    """Leave nothing of a partial folder but complete checkpoints."""
    for path in partial.glob("*"):
        if path.name != CHECKPOINTS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in partial.glob(f"{CHECKPOINTS}/*/.iteration-*"):
        shutil.rmtree(path, ignore_errors=True)


Owner = Callable[[Path], Owned | None]


def recover(final: Path, owned_by: Owner) -> None:
    """Put a place in order where a process died while it replaced a folder.

    Args:
        final: the place; claimed.
        owned_by: what is ours in a folder.

    Raises:
        UsageError: there is something in the way that is not ours.
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
            f"{old} holds what lay in {final} before and is not trtq's, e.g. {left[0]}; move it away"
        )


def replace_folder(partial: Path, final: Path, owned_by: Owner) -> None:
    """Move a complete folder to its place; of what is there already, only what is ours is removed.

    Files of the user move along into the new folder. Where one has a name that is taken there, it stays
    in the old folder, and a warning says so.

    Args:
        partial: the folder.
        final: its place; claimed.
        owned_by: what is ours in a folder.

    Raises:
        UsageError: what is there is not ours, or of another kind.
        OSError: it cannot be moved; what was there is there again.
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
        logger.warning("what lay in %s before cannot be removed from %s: %s", final, old, err)
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
    """Remove what is ours of an old folder and move the rest into the new one; names of what is left."""
    record = old / owned.record if owned is not None else None
    left = list(_retired(old, "", final, owned))
    if left:
        return left
    # Last of all, so that whoever is interrupted here can be followed by another one.
    if record is not None:
        record.unlink(missing_ok=True)
    old.rmdir()
    return []


def _retired(old: Path, below: str, final: Path, owned: Owned | None) -> Iterator[str]:
    with os.scandir(old / below) as found:
        entries = sorted(found, key=lambda entry: entry.name)
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
