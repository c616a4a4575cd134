"""The child's side of the protocol of `trtq.processes.Child`."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["error_record", "limit_resources", "questions", "serve_parent", "write_answer"]

_questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()


def serve_parent() -> None:
    """Receive the parent's questions in a thread, and end this process when the parent has ended."""

    def receive() -> None:
        rest = b""
        with suppress(OSError, ValueError):
            while data := os.read(0, 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    _questions.put(line)
        os._exit(1)

    threading.Thread(target=receive, name="parent", daemon=True).start()


def questions() -> Iterator[dict[str, Any]]:
    """Iterate over the parent's questions; the iterator never ends."""
    while True:
        yield json.loads(_questions.get())


def write_answer(path: Path, answer: Mapping[str, Any]) -> None:
    """Write the answer's file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(path)


def error_record(err: BaseException, message: str | None = None) -> dict[str, str]:
    """The answer that makes the parent raise an error.

    Args:
        err: an exception of trtq, or OSError.
        message: message of the raised error; None: the message of `err`.

    Returns:
        The answer, as a JSON object.
    """
    name = "OSError" if isinstance(err, OSError) else type(err).__name__
    return {"raised": name, "message": str(err) if message is None else message}


def limit_resources(max_bytes: int, max_seconds: float) -> None:
    """Limit the memory and the processor time of this process; no effect on Windows.

    Args:
        max_bytes: maximum size of the heap, in bytes.
        max_seconds: maximum time with all processors busy, in seconds.
    """
    try:
        import resource
    except ImportError:  # Windows.
        return
    busy = int(max_seconds * (os.cpu_count() or 1)) + 5
    for kind, limit in ((resource.RLIMIT_DATA, max_bytes), (resource.RLIMIT_CPU, busy)):
        _, hard = resource.getrlimit(kind)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):
            logging.getLogger(__name__).warning("cannot limit the memory and time of the process")
