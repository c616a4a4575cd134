"""A process per measured artefact: all are loaded, and each works only when it is asked to.

The memory of one artefact is therefore not counted in another's, and their timings can still be
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
    """A process that answers questions; use it as a context.

    Args:
        module: module whose `main` calls `answer_questions`.
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
        """Have the process do something, and wait for its answer.

        Raises:
            TrtqError: the process raised it.
            MeasurementError: the process failed in another way, or ended.
        """
        try:
            return self._child.ask({"ask": question} | arguments)
        except ChildDiedError as err:
            raise MeasurementError(err.exit.explain(f"{self.name}: its process")) from err

    def close(self) -> None:
        """End the process, even in the middle of an answer."""
        self._child.close()


def answer_questions(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """In the process: answer until the parent ends.

    Args:
        answers: functions by name of the question; called with its arguments.
    """
    # What libraries print must not stand among the answers.
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
    except Exception as err:  # Of any library: the row fails, the benchmark goes on.
        answer = error_record(MeasurementError(f"{type(err).__name__}: {err}"))
    out.write(json.dumps(answer) + "\n")
    out.flush()
