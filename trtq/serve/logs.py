"""The server's log: one JSON object per line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

from trtq.terminal import StderrHandler

__all__ = ["JsonFormatter", "log_to"]

FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """Formats time, level, message, the fields in `extra={"fields": {...}}` and the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of this package and of the HTTP server to a stream, by default standard error.

    Args:
        stream: text stream; None: standard error.
        level: minimum level of the messages.
    """
    handler = StderrHandler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in ("trtq.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "trtq.serve" else logging.WARNING)
