"""A worker process per measured artefact: all are loaded, but only one works at a time.

The memory of one artefact is therefore not attributed to another, and their timings can still be
interleaved. `trtq.processes` describes the protocol.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from trtq.child import error_record, questions
from trtq.errors import MeasurementError, TrtqError
from trtq.processes import Child, ChildDiedError

__all__ = ["Worker", "answer_questions"]


class Worker:
    """A process that answers requests; use it as a context manager.

    Args:
        module: name of a module whose `main` calls `answer_questions`.
        name: name of the row in messages.
    """

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self._child = Child(module, asked=True)

    def __enter__(self) -> Worker:
        """The worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Send a request to the process and wait for the answer.

        Args:
            question: name of the request.
            arguments: JSON values, the keyword arguments of the request.

        Raises:
            TrtqError: the process raised this error.
            MeasurementError: the process failed in another way, or ended.
        """
        try:
            return self._child.ask({"ask": question} | arguments)
        except ChildDiedError as err:
            raise MeasurementError(err.exit.explain(f"{self.name}: its process")) from err

    def close(self) -> None:
        """End the process, even while it answers a request."""
        self._child.close()


def answer_questions(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests until the parent process ends; called in the worker process.

    Args:
        answers: functions by name of the request; each returns a JSON object.
    """
    # Libraries may print, which must not corrupt the answers on standard output.
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for question in questions():
            _answer(answers, question, out)


def _answer(
    answers: Mapping[str, Callable[..., dict[str, Any]]], question: dict[str, Any], out: TextIO
) -> None:
    try:
        answer = answers[question.pop("ask")](**question)
    except TrtqError as err:
        answer = error_record(err)
    except Exception as err:  # Any exception of a library fails this row, but not the benchmark.
        answer = error_record(MeasurementError(f"{type(err).__name__}: {err}"))
    out.write(json.dumps(answer) + "\n")
    out.flush()
