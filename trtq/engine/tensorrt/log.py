"""Messages of TensorRT, collected instead of printed."""

from __future__ import annotations

from typing import Any

__all__ = ["collecting_logger"]

_MAX_WARNINGS = 20


def collecting_logger(trt: Any, errors: list[str], warnings: list[str]) -> Any:
    """A logger for the module `tensorrt` or `tensorrt_rtx` that appends messages to both lists."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)
            elif severity == trt.ILogger.WARNING and len(warnings) < _MAX_WARNINGS:
                warnings.append(message)

    return Logger()
