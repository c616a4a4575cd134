"""Locks: only one process at a time writes to a destination.

While a process writes to a destination, it holds the lock of a file next to it. The operating system
releases the lock however the process ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trtq.errors import UsageError

__all__ = ["claim"]

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


_UNLOCKED_BYTE = 1 << 20


_TRIES = 50


def _lock_file(final: Path) -> Path:
    return final.with_name(f".{final.name}.trtq-lock")


_held = threading.local()


@contextmanager
def claim(final: Path) -> Iterator[None]:
    """Hold the lock of a destination inside the block; the same thread may claim it again.

    Args:
        final: absolute path of the destination; missing parent folders are created, and removed again
            if they stay empty.

    Raises:
        UsageError: another process or thread is writing there, or the path is not writable.
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
    """Create the missing parent folders of a path and return them, innermost first."""
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
    """A lock on a destination: a hidden file next to it that names the holder.

    Args:
        final: absolute path of the destination.

    Raises:
        UsageError: another process or thread holds the lock, or the file cannot be created.
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
            if ours is None:  # The file system has no locks: rely on the file's text.
                ours = not _lives(_read_owner(self._path))
            if not ours:
                owner = _read_owner(self._path)
                os.close(self._file)
                raise UsageError(
                    f"{_owner_text(owner)} is writing to {final}; wait until it ends, or choose another "
                    "--output"
                )
            if self._still_there():
                break
            # The previous holder removed the file between the calls that opened and locked it here.
            os.close(self._file)
        else:
            raise UsageError(f"cannot lock {final}: {self._path} keeps being removed")
        # On a full disk the lock is held nevertheless, and writing fails later with its own message.
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(_me()).encode())

    def _still_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def release(self) -> None:
        """Remove the file and release the lock."""
        # Removed while still locked, if possible: a process that opened the file before sees it gone.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        if sys.platform == "win32":
            with suppress(OSError):
                self._path.unlink()


def _try_lock(file: int) -> bool | None:
    """Lock an open file and return whether that worked; None if the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _UNLOCKED_BYTE, os.SEEK_SET)  # A locked byte cannot be read.
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
    """Start time of a process, in the system's clock ticks; None if the system does not report it."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return None


def _me() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "start": _start_of(pid), "since": now}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock file is alive; assumed for a process on another machine."""
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


def _owner_text(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"
