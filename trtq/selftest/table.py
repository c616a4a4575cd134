"""The tables of `trtq selftest --read`: measured times next to predicted ones, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trtq.selftest.predicted import predict_row
from trtq.selftest.record import GpuRow, SelftestFile, TimeRow

__all__ = ["table_lines"]

_HEADER = (
    *("layer", "form", "quantise", "product", "both", "half precision", "speed-up"),
    *("predicted both", "measured / predicted", "predicted speed-up"),
)
_MAX_FAILURES = 20


def table_lines(record: SelftestFile) -> Iterator[str]:
    """The lines of one file: the GPU, what failed, and the times of each layer.

    Predictions are those of this version's model, not those that the file holds.
    """
    tested = [gpu for gpu in record.gpus if gpu.tested]
    gpu = tested[0] if tested else None
    yield f"### {_title(record, gpu)}"
    yield ""
    yield _state(record)
    for row in record.failed[:_MAX_FAILURES]:
        yield f"- stage {row.stage}, {row.name}: {row.error}"
    if len(record.failed) > _MAX_FAILURES:
        yield f"- and {len(record.failed) - _MAX_FAILURES} more"
    for skipped in (row for row in record.checks if row.ok is None):
        yield f"- stage {skipped.stage}, {skipped.name}, skipped: {skipped.skipped}"
    yield ""
    if not record.rows or gpu is None:
        yield "The file has no times: stage 6 did not run."
        return
    yield f"| {' | '.join(_HEADER)} |"
    yield f"|{' --- |' * len(_HEADER)}"
    for times in record.rows:
        yield f"| {' | '.join(_cells(times, gpu))} |"
    yield ""
    yield "Times in microseconds."
    for form in dict.fromkeys(row.form for row in record.rows):
        yield _means(form, [row for row in record.rows if row.form == form], gpu)


def _title(record: SelftestFile, gpu: GpuRow | None) -> str:
    name = "no GPU" if gpu is None else f"{gpu.name} ({gpu.architecture})"
    commit = "" if record.commit is None else f", commit {record.commit[:7]}"
    return f"{name}, trtq {record.trtq}{commit}"


def _state(record: SelftestFile) -> str:
    passed = sum(row.ok is True for row in record.checks)
    text = f"{passed} of {len(record.checks)} checks passed, {len(record.failed)} failed"
    options = f" with {', '.join(record.options)}" if record.options else ""
    end = "" if record.complete else "; the command was interrupted"
    return f"{text}{options}; driver {record.machine.get('driver')}{end}."


def _ratio(row: TimeRow, gpu: GpuRow) -> tuple[float, float] | None:
    """Predicted time of the layer, and predicted speed-up; None without a prediction."""
    predicted = predict_row(gpu, row.shape, row.form)
    if predicted is None:
        return None
    both = predicted.quantise_microseconds + predicted.product_microseconds
    return both, predicted.speedup


def _cells(row: TimeRow, gpu: GpuRow) -> list[str]:
    wrong = f" ({row.wrong_values} wrong values)" if row.wrong_values else ""
    cells = [f"{row.model}, {row.shape}{wrong}", row.form.upper()]
    cells += [f"{value:.1f}" for value in (row.quantise, row.product, row.both, row.half)]
    cells.append(f"{row.half / row.both:.2f}")
    predicted = _ratio(row, gpu)
    if predicted is None:
        return [*cells, "-", "-", "-"]
    both, speedup = predicted
    return [*cells, f"{both:.1f}", f"{row.both / both:.2f}", f"{speedup:.2f}"]


def _means(form: str, rows: Sequence[TimeRow], gpu: GpuRow) -> str:
    """The geometric means of a form."""
    text = f"{form.upper()}: mean speed-up {_mean([row.half / row.both for row in rows]):.2f}"
    pairs = [(row, predicted) for row in rows if (predicted := _ratio(row, gpu)) is not None]
    if not pairs:
        return f"{text}; no prediction for this GPU"
    speedup = _mean([predicted[1] for _, predicted in pairs])
    ratio = _mean([row.both / predicted[0] for row, predicted in pairs])
    return f"{text}, predicted {speedup:.2f}; mean measured / predicted time {ratio:.2f}"


def _mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))
