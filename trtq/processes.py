"""Child processes that run a module of trtq, and an orderly end of this process on signals.

The protocol of a child:

1. `Child` starts `MODULE.main()` in a new Python process.
2. Standard input is a pipe that the parent never closes before the end. When the parent ends, for any
   reason, the pipe closes and the child ends too. Otherwise the child would keep running, and write to a
   destination that another process may own by then.
3. A child has one job, in `sys.argv[1:]`, and writes its answer to the file named by the last argument;
   or it receives questions as lines of JSON on standard input and answers with lines on standard output.
4. An answer with the key `raised` is an exception of the child that the parent raises again.
5. Standard error goes to a file. If the child ends without an answer, `Exit.explain` gives the reason
   and quotes the last lines.

`trtq.child` implements the child's side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq import errors

__all__ = [
    "Child",
    "ChildDiedError",
    "Exit",
    "StoppedBySignal",
    "ending_on_signals",
    "last_words",
    "worker_command",
]

_PACKAGE = Path(__file__).parent
_LAST_LINES = 5
_WINDOWS_FAILURES = 0xC0000000
"""Exit codes from this value on are exceptions that ended a process on Windows."""


@dataclass(frozen=True)
class Exit:
    """How a process ended.

    Attributes:
        code: exit code as `subprocess` returns it; the negated number of a signal if one ended it.
        stderr: text on standard error.
    """

    code: int
    stderr: str = ""

    @property
    def killed(self) -> bool:
        """Whether the process was killed, as the system does when memory runs out."""
        return self.code == -getattr(signal, "SIGKILL", 9)  # Windows has no such signal.

    @property
    def crash(self) -> str | None:
        """Signal or exception that crashed the process, e.g. `SIGSEGV` or `0xC0000005`; else None."""
        if self.code < 0:
            try:
                return signal.Signals(-self.code).name
            except ValueError:  # A real-time signal.
                return f"signal {-self.code}"
        return f"0x{self.code:08X}" if self.code >= _WINDOWS_FAILURES else None

    def explain(
        self, process: str, *, memory: str = "", advice: str = "", max_length: int | None = None
    ) -> str:
        """Explain on one line why the process died.

        Args:
            process: subject of the sentence, e.g. `the builder`.
            memory: details for a killed process, e.g. `: it needs about 3 GiB`.
            advice: remedy for a crash, e.g. `; see trtq verify`.
            max_length: maximum number of quoted characters of the last output; None: all.
        """
        last = last_words(self.stderr)[:max_length]
        if self.killed:
            quoted = f"; last output: {last}" if last else ""
            return f"{process} was killed, most likely because memory ran out{memory}{quoted}"
        how = f"ended with code {self.code}" if self.crash is None else f"crashed ({self.crash})"
        return f"{process} {how}{advice if self.crash else ''}; last output: {last or 'none'}"


class ChildDiedError(Exception):
    """A child ended without an answer; callers chain an error of trtq to this one.

    Attributes:
        exit: how the child ended.
    """

    def __init__(self, how: Exit) -> None:
        super().__init__(how.explain("the process"))
        self.exit = how


class Child:
    """A child process that runs a module of trtq; use it as a context, which ends the process.

    Args:
        module: name of the module whose `main` runs in the process.
        arguments: `sys.argv[1:]` of the process; the path of the answer's file follows unless `asked`.
        env: environment variables; None: those of this process.
        asked: whether the child receives questions on standard input instead of one job.
        new_session: start a session: Ctrl-C does not reach the child, and its children end with it.
    """

    def __init__(
        self,
        module: str,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        asked: bool = False,
        new_session: bool = False,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="trtq-child-")
        self.answer_file = Path(self._scratch.name) / "answer.json"
        self._stderr = Path(self._scratch.name) / "stderr"
        self._new_session = new_session
        command = worker_command(module, *arguments, *(() if asked else (self.answer_file,)))
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if asked else subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=new_session,
            )

    def __enter__(self) -> Child:
        """Return this child."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def wait(self, timeout: float | None = None) -> Exit:
        """Wait for the end of the process.

        Args:
            timeout: time limit in seconds; None: no limit.

        Raises:
            TimeoutError: the process is still running.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as err:
            raise TimeoutError(f"the process took more than {timeout:g} s") from err
        return Exit(code, self._stderr.read_text(errors="replace", encoding="utf-8"))

    def answer(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end of the process and return the contents of its answer's file.

        Args:
            timeout: time limit in seconds; None: no limit.

        Raises:
            TimeoutError: the process is still running.
            ChildDiedError: the process ended without an answer.
            TrtqError, OSError: the child raised such an error.
        """
        how = self.wait(timeout)
        try:
            answer = json.loads(self.answer_file.read_bytes())
        except (OSError, ValueError) as err:
            raise ChildDiedError(how) from err
        return _checked(answer, how)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a question and wait for the answer.

        Raises:
            ChildDiedError: the process ended without an answer.
            TrtqError: the child raised such an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise ChildDiedError(self.wait())
        return _checked(json.loads(line), Exit(0))

    def close(self) -> None:
        """Kill the process, and the session that it leads, unless it has ended."""
        try:
            if self._new_session and hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        except (ProcessLookupError, PermissionError):  # It has ended; macOS raises the second.
            pass
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._scratch.cleanup()


def _checked(answer: Any, how: Exit) -> dict[str, Any]:
    """The answer, if it is an object; an exception of the child is raised."""
    if not isinstance(answer, dict):
        raise ChildDiedError(how)
    if "raised" not in answer:
        return answer
    name = answer["raised"]
    kind = OSError if name == "OSError" else getattr(errors, name, errors.TrtqError)
    raise kind(answer["message"])


def worker_command(module: str, *arguments: str | Path) -> list[str]:
    """The command that calls `main` of a module in a child, see the module docstring.

    The child imports the package from the same folder as this process. The folder is the last entry of
    the path, so that no module in the user's folder or next to the package can shadow a library.
    """
    code = f"import sys; sys.path.append({str(_PACKAGE.parent)!r}); "
    code += "from trtq.child import serve_parent; serve_parent(); "
    code += f"from {module} import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *map(str, arguments)]


def last_words(text: str, lines: int = _LAST_LINES) -> str:
    """The end of a process's standard error on one line; only the last line of a traceback.

    Args:
        text: text on standard error.
        lines: maximum number of lines.

    Returns:
        The last lines, or an empty text if there are none.
    """
    rows = [line.strip() for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in rows:
        lines = 1
    return " / ".join(rows[-lines:])


class StoppedBySignal(SystemExit):
    """A signal asked this process to end; unfinished files are removed on the way out.

    The exit code is the conventional 128 plus the signal's number.

    Attributes:
        name: name of the signal, e.g. `SIGTERM`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block with an exception, as Ctrl-C does, so that cleanup runs.

    Signals that this process was started to ignore (as nohup does) stay ignored.
    """
    names = ("SIGTERM", "SIGHUP", "SIGBREAK")  # The last exists on Windows only.
    numbers = [number for name in names if (number := getattr(signal, name, None)) is not None]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return

    def stop(number: int, _: Any) -> None:
        # A second signal must not interrupt the cleanup.
        for ignored in numbers:
            signal.signal(ignored, signal.SIG_IGN)
        raise StoppedBySignal(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            # A server may have installed handlers in the meantime.
            if signal.getsignal(number) in (stop, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)
