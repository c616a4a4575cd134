"""What this process uses, and where it keeps what it made."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = [
    "available_bytes",
    "cache_folder",
    "forget_peak_rss",
    "peak_rss_bytes",
    "rss_bytes",
]


def rss_bytes() -> int:
    """The resident memory of this process now, in bytes; 0 where the system does not say."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had so far, in bytes; 0 where nobody counts it."""
    # What getrusage counts in a child begins with the peak of the process that started it.
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
    """Let `peak_rss_bytes` count from now on; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def available_bytes() -> int:
    """Memory that a new process could take, in bytes; 0 where the system does not say.

    Of the machine, or of the container (cgroup v2) where that is less.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    try:
        most, used = (
            int((Path("/sys/fs/cgroup") / name).read_text())
            for name in ("memory.max", "memory.current")
        )
        found.append(max(most - used, 0))
    except (OSError, ValueError):  # No such files, or "max".
        pass
    return min(found, default=0)


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept: in `TRTQ_CACHE`, or in the user's own cache folder.

    Raises:
        RuntimeError: the user has no home, or `TRTQ_CACHE` is `off`.
    """
    own = os.environ.get("TRTQ_CACHE")
    if own == "off":
        raise RuntimeError("TRTQ_CACHE switches the cache off")
    if own:
        return Path(own) / kind
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trtq" / kind
