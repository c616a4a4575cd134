"""Conversion of onnxruntime's errors to errors of trtq, by one table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from trtq.errors import ArtefactError, TrtqError, UsageError

__all__ = ["onnxruntime_errors"]

Action = Literal["load", "run", "start"]
_ERRORS: dict[Action, tuple[type[TrtqError], str]] = {
    "load": (ArtefactError, "onnxruntime cannot load {}: {}"),
    "run": (ArtefactError, "onnxruntime cannot run the graph on {}: {}"),
    "start": (UsageError, "the provider {!r} cannot start on this machine: {}"),
}
"""Exception class and message by failed action; placeholders: file or provider, onnxruntime's text."""
_OUT_OF_MEMORY = ("memory", "CUBLAS_STATUS_ALLOC_FAILED")
_MAX_LENGTH = 400
_SOURCE_PLACE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(?:cc|h):\d+ \S.*?\) (?=[A-Z])"
)
"""Parts of onnxruntime's messages to drop: codes, and the line and function of its own source."""


@contextmanager
def onnxruntime_errors(action: Action, name: object) -> Iterator[None]:
    """Inside the block, raise errors of onnxruntime as errors of trtq, in one line.

    Args:
        action: action of the block.
        name: file to load, or name of the provider.

    Raises:
        ArtefactError: the graph cannot be loaded or run.
        UsageError: the provider cannot start.
    """
    try:
        yield
    except TrtqError:
        raise
    except Exception as err:  # onnxruntime's own exceptions share no base but Exception.
        kind, message = _ERRORS[action]
        text = _line(err)
        full = action == "run" and any(word in text for word in _OUT_OF_MEMORY)
        advice = "; take a smaller batch or size" if full else ""
        raise kind(message.format(name, text) + advice) from err


def _line(err: Exception) -> str:
    """The message of an onnxruntime error in one line of limited length."""
    text = _SOURCE_PLACE.sub("", " ".join(str(err).split()))
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} ..."
