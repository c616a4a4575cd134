"""The measurements of a benchmark: interleaved timings, images, memory and operation counts."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trtq.bench.measured import DENOISER
from trtq.bench.process import Worker
from trtq.bench.rows import ActiveRow, Plan, check_any_left, live_rows
from trtq.bench.summary import median_interval, summarize
from trtq.bench.turns import rotated
from trtq.errors import TrtqError
from trtq.progress import ProgressCallback

__all__ = ["ask_optional", "measure"]

logger = logging.getLogger(__name__)


def measure(rows: list[ActiveRow], plan: Plan, progress: ProgressCallback) -> None:
    """Measure every row as planned; the results are stored in the rows.

    Args:
        rows: opened rows.
        plan: plan of the measurements.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: no row can run with these arguments.
        MeasurementError: every row has failed.
    """
    with tempfile.TemporaryDirectory(prefix="trtq-bench-") as scratch:
        for batch in plan.batches:
            _measure_parts(rows, batch, plan, progress)
            _measure_images(rows, batch, plan, Path(scratch), progress)
    _measure_memory(rows)
    _count_operations(rows, plan)
    check_any_left(rows)


def _measure_parts(
    rows: list[ActiveRow], batch: int, plan: Plan, progress: ProgressCallback
) -> None:
    """Time every part at one batch size, in interleaved rounds."""
    sampling = {"steps": plan.steps, "guidance": plan.guidance}
    for row in live_rows(rows):
        row.batches[batch] = {"batch": batch, "parts": {}}
    for part in next((row.opened["parts"] for row in live_rows(rows)), []):
        for row in live_rows(rows):
            prepared = row.ask("prepare", part=part, batch=batch, **sampling)
            if prepared is not None and part == DENOISER:
                row.batches[batch]["first_call_seconds"] = prepared["first_call_seconds"]
        seconds: dict[str, list[list[float]]] = {row.label: [] for row in rows}
        for turn in range(plan.turns):
            progress(f"time {part}, batch {batch}", turn + 1, plan.turns)
            for row in rotated(live_rows(rows), turn):
                timed = row.ask("time")
                if timed is not None:
                    seconds[row.label].append(timed["seconds"])
        for row in live_rows(rows):
            row.batches[batch]["parts"][part] = summarize(seconds[row.label])


def _measure_images(
    rows: list[ActiveRow], batch: int, plan: Plan, scratch: Path, progress: ProgressCallback
) -> None:
    """Time whole images at one batch size, interleaved; keep the images of the first batch size."""
    count = plan.image_batches(batch)
    out = str(scratch / "images.npy") if batch == plan.batches[0] else None
    sampling: dict[str, Any] = {
        "batch": batch,
        "steps": plan.steps,
        "seed": plan.seed,
        "guidance": plan.guidance,
        "prompts": plan.prompts,
    }
    for row in live_rows(rows):
        row.ask("draw", turn=None, out=None, **sampling)
    seconds: dict[str, list[list[float]]] = {row.label: [] for row in rows}
    joules: dict[str, list[float]] = {row.label: [] for row in rows}
    for turn in range(count):
        progress(f"generate, batch {batch}", turn + 1, count)
        for row in rotated(live_rows(rows), turn):
            answer = row.ask("draw", turn=turn, out=out, **sampling)
            if answer is None:
                continue
            seconds[row.label].append([answer["seconds"]])
            if answer["joules"] is not None:
                joules[row.label].append(answer["joules"])
            if out is not None:
                row.images.append(np.load(out))
    for row in live_rows(rows):
        row.batches[batch] |= _image_statistics(batch, seconds[row.label], joules[row.label])


def _image_statistics(
    batch: int, seconds: list[list[float]], joules: list[float]
) -> dict[str, Any]:
    """Timings of whole batches as images per second, and energy per image."""
    summary = summarize(seconds)
    interval = median_interval(summary["turns"])
    return {
        "batch_of_images": summary,
        "images_per_second": 1e3 * batch / summary["p50"],
        "images_per_second_interval": interval
        and [1e3 * batch / milliseconds for milliseconds in reversed(interval)],
        "joules_per_image": sum(joules) / len(joules) / batch if joules else None,
    }


def _measure_memory(rows: list[ActiveRow]) -> None:
    for row in live_rows(rows):
        memory = row.opened["memory"] | (row.ask("memory") or {})
        peaks = (memory["load_peak_bytes"], memory.get("run_peak_bytes", 0))
        row.memory = memory | {"peak_bytes": max(peaks)}


def _count_operations(rows: list[ActiveRow], plan: Plan) -> None:
    """Count the denoiser's operations in one worker, after its memory was measured."""
    counter = next(iter(live_rows(rows)), None)
    for batch in plan.batches:
        answer = counter and ask_optional(
            counter.worker, "operations", batch=batch, steps=plan.steps, guidance=plan.guidance
        )
        for row in rows:
            row.operations[batch] = answer["operations"] if answer else None


def ask_optional(worker: Worker | None, question: str, **arguments: Any) -> dict[str, Any] | None:
    """Send a request that no timing depends on; log a failure and return None.

    Args:
        worker: worker process; None: no request is sent.
        question: name of the request.
        arguments: JSON values, the keyword arguments of the request.
    """
    try:
        return None if worker is None else worker.ask(question, **arguments)
    except TrtqError as err:
        logger.warning("%s: no %s: %s", worker.name if worker else "", question, err)
        return None
