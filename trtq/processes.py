"""Starting a module of ours in a process of its own, and ending well when one is told to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "StoppedBySignal",
    "crash_name",
    "end_with_lifeline",
    "ending_on_signals",
    "last_words",
    "lifeline",
    "processors",
    "was_killed",
    "worker_command",
]

_PACKAGE = Path(__file__).parent


def worker_command(module: str, *arguments: str | Path) -> list[str]:
    """The command that calls `main` of a module; its arguments are in `sys.argv[1:]`.

    Its standard input is a `lifeline`: the process ends when this one has ended, in whatever way. Nobody
    else would stop it, and it would go on writing to a place that is another process's by then.

    The package is found where this one was, after everything else: nothing in the user's folder, nor a
    module beside the package, takes the place of a library.
    """
    code = f"import sys; sys.path.append({str(_PACKAGE.parent)!r}); "
    code += "from trtq.processes import end_with_lifeline; end_with_lifeline(); "
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


def last_words(said: str, lines: int = 3) -> str:
    """The end of what a process wrote to standard error, on one line; of a traceback its last line.

    Args:
        said: the text.
        lines: how many of its last lines.

    Returns:
        An empty text if there is none.
    """
    found = [line.strip() for line in said.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in found:
        lines = 1
    return " / ".join(found[-lines:])


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows.
        return os.cpu_count() or 1


class StoppedBySignal(SystemExit):
    """A signal asked this process to end; what it was writing is cleaned up on the way out.

    Its code is the conventional one, 128 and the signal's number.

    Attributes:
        name: of the signal, e.g. `SIGTERM`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: by an exception, and things are tidied.

    Those that whoever started us has told us to ignore (nohup does) stay ignored.
    """
    names = ("SIGTERM", "SIGHUP", "SIGBREAK")  # The last is Windows' own.
    numbers = [number for name in names if (number := getattr(signal, name, None)) is not None]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return

    def stop(number: int, _: Any) -> None:
        # The second of them must not cut off the tidying.
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise StoppedBySignal(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            # A server may have handlers of its own by now.
            if signal.getsignal(number) in (stop, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def lifeline() -> Iterator[int]:
    """Standard input for a worker: a pipe that nothing is written to, and that closes when this ends."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def end_with_lifeline() -> None:
    """End this process, a worker's, when its standard input is closed on the other side."""

    def wait() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
