"""Starting a module of ours in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

__all__ = ["crash_name", "processors", "was_killed", "worker_command"]

_PACKAGE = Path(__file__).parent


def worker_command(module: str, *arguments: str | Path) -> list[str]:
    """The command that calls `main` of a module; its arguments are in `sys.argv[1:]`.

    The package is found where this one was, after everything else: nothing in the user's folder, nor a
    module beside the package, takes the place of a library.
    """
    code = f"import sys; sys.path.append({str(_PACKAGE.parent)!r}); "
    code += f"from {module} import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


_WINDOWS_FAILURES = 0xC0000000
"""Exit codes from here on are exceptions that ended a process of Windows."""


def was_killed(code: int) -> bool:
    """Whether a process with this exit code was killed, as for want of memory."""
    return code == -getattr(signal, "SIGKILL", 9)  # Windows has no such signal.


def crash_name(code: int) -> str | None:
    """What ended a process that crashed, e.g. `SIGSEGV` or `0xC0000005`; None: it ended by itself."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:  # A real-time signal.
            return f"signal {-code}"
    return f"0x{code:08X}" if code >= _WINDOWS_FAILURES else None


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows.
        return os.cpu_count() or 1
