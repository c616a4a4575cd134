"""A process per measured artefact: all are loaded, and each works only when it is asked to.

So the memory of one is not counted in another's, and their timings can still take turns. Questions and
answers are lines of JSON over pipes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import trtq.errors
from trtq.errors import MeasurementError, TrtqError
from trtq.processes import crash_name, last_words, was_killed

__all__ = ["Worker", "answer_questions"]

_PACKAGE = Path(__file__).parent.parent
_LAST_LINES = 3


class Worker:
    """A process that answers questions; use it as a context.

    Args:
        module: its `main` calls `answer_questions`.
        name: for messages.
    """

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="trtq-worker-")
        self._stderr = Path(self._scratch.name) / "stderr"
        # The package is found where this one was, after everything else: nothing in the user's folder,
        # nor a module beside the package, takes the place of a library.
        code = f"import sys; sys.path.append({str(_PACKAGE.parent)!r}); "
        code += f"from {module} import main; main()"
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __enter__(self) -> Worker:
        """The worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Have the process do something, and wait for what it says.

        Raises:
            TrtqError: what was raised there.
            MeasurementError: it failed in another way, or ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"ask": question} | arguments) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise MeasurementError(f"{self.name}: {self._why_it_ended()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(trtq.errors, answer["kind"], MeasurementError)
            raise kind(answer["error"])
        return answer

    def close(self) -> None:
        """End the process, however it feels about it."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if was_killed(code):
            return "its process was killed, most likely for want of memory"
        said = last_words(self._stderr.read_text(errors="replace"), _LAST_LINES)
        crash = crash_name(code)
        what = f"ended with code {code}" if crash is None else f"crashed ({crash})"
        return f"its process {what}; it said last: {said or 'nothing'}"


def answer_questions(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The other side: answer until there are no more questions.

    Args:
        answers: by name of the question; called with its arguments.
    """
    # What libraries print must not stand among the answers.
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            _answer(answers, json.loads(line), out)


def _answer(
    answers: Mapping[str, Callable[..., dict[str, Any]]], question: dict[str, Any], out: TextIO
) -> None:
    try:
        found = answers[question.pop("ask")](**question)
    except TrtqError as err:
        found = {"error": str(err), "kind": type(err).__name__}
    except Exception as err:  # Of any library: it is the row's misfortune, not the program's end.
        found = {"error": f"{type(err).__name__}: {err}", "kind": MeasurementError.__name__}
    out.write(json.dumps(found) + "\n")
    out.flush()
