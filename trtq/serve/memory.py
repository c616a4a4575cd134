"""Copies of mapped weights in the server's own memory, independent of the files.

Runtimes map files instead of reading them. If such a file is truncated in place, the next access ends
the process (SIGBUS); if it is overwritten, the model computes with the wrong weights. Replacing a file
by renaming is harmless.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from trtq.errors import ArtefactError

__all__ = ["copy_mapped_files", "mapped_files"]

_MAPS = Path("/proc/self/maps")
_PART = 64 << 20
"""Number of bytes that are copied at a time, and so are in memory twice."""
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
    """The process's mappings of data files; empty if the system does not list mappings."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    rows = [line.split(maxsplit=5) for line in lines]
    rows = [row for row in rows if len(row) == 6 and row[5].startswith("/")]
    programs = {row[5] for row in rows if "x" in row[1]}
    mappings = []
    for addresses, rights, offset, _, inode, path in rows:
        # A shared writable mapping ("s") writes to its file, so it must stay.
        shared = rights[3] == "s" and "w" in rights
        if path in programs or path.startswith(_NO_DATA) or "r" not in rights or shared:
            continue
        start, _, end = addresses.partition("-")
        mappings.append(
            _Mapping(int(start, 16), int(end, 16), "w" in rights, int(offset, 16), int(inode), path)
        )
    return mappings


def mapped_files() -> set[str]:
    """The absolute paths of the data files that this process has mapped."""
    return {mapping.path for mapping in _mappings()}


def copy_mapped_files(before: set[str]) -> int:
    """Replace file mappings of the process with anonymous memory that has the same content.

    Addresses stay the same, and other threads may read meanwhile. The function works on Linux only; on
    other systems it does nothing.

    Args:
        before: absolute paths of the files to skip: those mapped before the model was opened.

    Returns:
        Number of bytes copied.

    Raises:
        ArtefactError: a file is shorter than its mapping.
    """
    copied = 0
    for mapping in _mappings():
        if mapping.path in before:
            continue
        _check_length(mapping)
        for start in range(mapping.start, mapping.end, _PART):
            size = min(_PART, mapping.end - start)
            _replace(start, size, writable=mapping.writable)
            copied += size
    return copied


def _check_length(mapping: _Mapping) -> None:
    try:
        status = os.stat(mapping.path)
    except OSError:
        return  # The file is deleted; its mapping stays valid.
    if status.st_ino != mapping.inode:
        return  # The file is replaced, by renaming.
    if mapping.offset + (mapping.end - mapping.start) >= status.st_size + mmap.PAGESIZE:
        raise ArtefactError(
            f"{mapping.path} was cut short while it was opened; restore the whole file"
        )


def _replace(start: int, size: int, *, writable: bool) -> None:
    if sys.platform != "linux":  # `_mappings` reads /proc, so only Linux gets here.
        raise OSError("only Linux replaces mapped memory in place")
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
    # mremap is atomic: a concurrent reader sees the old or the new pages, which have the same content.
    if libc.mremap(copy, size, size, _MAY_MOVE_TO, start) != start:
        raise MemoryError(f"cannot put {size} bytes of weights in place: {_reason()}")


def _reason() -> str:
    number = ctypes.get_errno()
    return errno.errorcode.get(number, str(number))
