"""Memory of this process and of the machine, and the cache folder."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = [
    "available_bytes",
    "cache_folder",
    "forget_peak_rss",
    "peak_rss_bytes",
    "return_freed_memory",
    "rss_bytes",
]


_MMAP_THRESHOLD = -3
"""The parameter `M_MMAP_THRESHOLD` of glibc's mallopt."""
_LARGE_BLOCK = 1 << 20


def rss_bytes() -> int:
    """Resident memory of this process, in bytes; 0 if the operating system does not report it."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes; 0 if the operating system does not report it."""
    # In a child process, getrusage starts from the peak of the parent process.
    counted = _status_bytes("VmHWM")
    if counted:
        return counted
    try:
        import resource
    except ImportError:  # Windows.
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_rss() -> bool:
    """Reset `peak_rss_bytes` to the current memory.

    Returns:
        Whether the operating system supports this.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def available_bytes() -> int:
    """Memory available to a new process, in bytes; 0 if the operating system does not report it.

    The result is the smaller of the machine's and the container's (cgroup v2) available memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    limits = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    try:
        limit, used = (
            int((Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8"))
            for name in ("memory.max", "memory.current")
        )
        limits.append(max(limit - used, 0))
    except (OSError, ValueError):  # No such files, or "max".
        pass
    return min(limits, default=0)


def return_freed_memory() -> None:
    """Let this process return large freed blocks to the operating system at once, where it can.

    glibc keeps freed blocks of up to 32 MiB in its heap, between blocks that are in use. A process that
    reads one weight after the other would grow to the size of all of them.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # Another C library.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def cache_folder(kind: str) -> Path:
    """Cache folder of one kind of data, in `TRTQ_CACHE` or in the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder, or `TRTQ_CACHE` is `off`.
    """
    configured = os.environ.get("TRTQ_CACHE")
    if configured == "off":
        raise RuntimeError("TRTQ_CACHE=off disables the cache")
    if configured:
        return Path(configured) / kind
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trtq" / kind
