"""Starting a module of ours in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["processors", "worker_command"]

_PACKAGE = Path(__file__).parent


def worker_command(module: str, *arguments: str | Path) -> list[str]:
    """The command that calls `main` of a module; its arguments are in `sys.argv[1:]`.

    The package is found where this one was, after everything else: nothing in the user's folder, nor a
    module beside the package, takes the place of a library.
    """
    code = f"import sys; sys.path.append({str(_PACKAGE.parent)!r}); "
    code += f"from {module} import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows.
        return os.cpu_count() or 1
