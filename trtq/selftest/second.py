"""A process that opens an engine which another process has run, and compares it again."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trtq.child import error_record, write_answer
from trtq.errors import TrtqError
from trtq.pipelines.open import open_any
from trtq.selftest.agreement import compare_denoiser

__all__ = ["main"]


def main() -> int:
    """Compare; the arguments are engine folder, ONNX folder, timesteps, and the path of the answer."""
    engine, onnx, timesteps, answer = sys.argv[1:]
    try:
        start = time.monotonic()
        opened = open_any(engine)
        seconds = time.monotonic() - start
        outcome = compare_denoiser(
            open_any(onnx, "cpu"), opened.denoiser, [float(text) for text in timesteps.split(",")]
        )
    except (TrtqError, OSError) as err:
        write_answer(Path(answer), error_record(err))
        return 1
    detail = {**outcome.detail, "open_seconds": round(seconds, 3)}
    write_answer(Path(answer), {"detail": detail, "fault": outcome.fault})
    return 0
