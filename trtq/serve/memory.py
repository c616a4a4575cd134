"""Weights that a server holds in memory of its own, whatever happens to their files.

Runtimes map files instead of reading them. Where such a file is cut short, in place, the next access
ends the process (SIGBUS); where it is overwritten, the model draws with other weights. Files that are
replaced by renaming do neither.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from trtq.errors import ArtefactError

__all__ = ["mapped_files", "own_mapped_files"]

_MAPS = Path("/proc/self/maps")
_PART = 64 << 20
"""Bytes that are copied at a time; so many are in memory twice."""
_MAY_MOVE_TO = 1 | 2
"""Flags of mremap: MREMAP_MAYMOVE and MREMAP_FIXED."""
_NO_DATA = ("/dev/", "/memfd:", "/SYSV", "/run/shm/")


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    writable: bool
    offset: int
    inode: int
    path: str


def _mappings() -> list[_Mapping]:
    """The mappings of data files; none where the system does not tell."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    rows = [line.split(maxsplit=5) for line in lines]
    rows = [row for row in rows if len(row) == 6 and row[5].startswith("/")]
    programs = {row[5] for row in rows if "x" in row[1]}
    found = []
    for addresses, rights, offset, _, inode, path in rows:
        # What a program writes into a file this way ("s") is not to be taken away.
        shared = rights[3] == "s" and "w" in rights
        if path in programs or path.startswith(_NO_DATA) or "r" not in rights or shared:
            continue
        start, _, end = addresses.partition("-")
        found.append(
            _Mapping(int(start, 16), int(end, 16), "w" in rights, int(offset, 16), int(inode), path)
        )
    return found


def mapped_files() -> set[str]:
    """The data files that this process has mapped, by absolute path."""
    return {one.path for one in _mappings()}


def own_mapped_files(before: set[str]) -> int:
    """Put memory of the process's own in the place of files it has mapped, with the same content.

    Addresses stay, and other threads may read meanwhile. Only Linux has what it takes; elsewhere
    nothing is done.

    Args:
        before: files to leave alone: those that were mapped before the model was opened.

    Returns:
        Bytes that were copied.

    Raises:
        ArtefactError: a file is shorter than what was mapped of it.
    """
    copied = 0
    for one in _mappings():
        if one.path in before:
            continue
        _check_length(one)
        for start in range(one.start, one.end, _PART):
            size = min(_PART, one.end - start)
            _replace(start, size, one.writable)
            copied += size
    return copied


def _check_length(one: _Mapping) -> None:
    try:
        found = os.stat(one.path)
    except OSError:
        return  # It was deleted; what is mapped of it stays.
    if found.st_ino != one.inode:
        return  # It was replaced, by renaming.
    length = found.st_size
    if one.offset + (one.end - one.start) >= length + mmap.PAGESIZE:
        raise ArtefactError(f"{one.path} was cut short while it was opened; restore the whole file")


def _replace(start: int, size: int, writable: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    copy = libc.mmap(None, size, rights, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no memory for {size} bytes of weights: {_reason()}")
    ctypes.memmove(copy, start, size)
    if not writable:
        libc.mprotect(copy, size, mmap.PROT_READ)
    # In one move: whoever reads there meanwhile finds the one or the other, which are the same.
    if libc.mremap(copy, size, size, _MAY_MOVE_TO, start) != start:
        raise MemoryError(f"cannot put {size} bytes of weights in place: {_reason()}")


def _reason() -> str:
    number = ctypes.get_errno()
    return errno.errorcode.get(number, str(number))
