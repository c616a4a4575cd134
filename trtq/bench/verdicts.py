"""Turn measured rows into a result: speedups, verdicts, PSNR and roofline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from trtq.artefact.manifest_file import package_versions
from trtq.bench.cost import roofline
from trtq.bench.device import Peak
from trtq.bench.history import FORMAT_VERSION
from trtq.bench.measured import DENOISER
from trtq.bench.result import BenchResult, MeasuredRow
from trtq.bench.rows import TIMINGS, ActiveRow, Plan, float_rivals
from trtq.bench.summary import speedup
from trtq.evaluation.metrics import psnr_db

__all__ = ["make_result"]


def make_result(
    rows: list[ActiveRow],
    plan: Plan,
    peaks: Mapping[str, Peak | None],
    device: dict[str, Any],
    notes: list[str],
) -> BenchResult:
    """Compare the rows and collect everything in a result.

    Args:
        rows: measured rows.
        plan: plan of the measurements.
        peaks: peak performance, by `cpu`, `gpu float` and `gpu low-bit`.
        device: description of the device.
        notes: remarks for the user; remarks about rows without a baseline are added.
    """
    for batch in plan.batches:
        _add_speedups(rows, batch, plan.comparisons)
    measured_rows = [_measured_row(row, rows, plan, peaks) for row in rows]
    judged = [row for row in measured_rows if row.low_bit and row.measured]
    unjudged = [row.label for row in judged if row.speedup is None]
    floats = [row for row in measured_rows if not row.low_bit]
    notes += [_why_unjudged(label, floats) for label in unjudged if floats]
    return BenchResult(
        model_class=plan.model_class,
        shape=plan.shape,
        format_version=FORMAT_VERSION,
        device=device,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        steps=plan.steps,
        guidance=plan.guidance,
        turns=plan.turns,
        comparisons=plan.comparisons,
        threads=plan.threads,
        seed=plan.seed,
        packages=package_versions(),
        rows=measured_rows,
        slower=_with_verdict(judged, "slower"),
        undecided=_with_verdict(judged, "too few turns"),
        unjudged=unjudged,
        notes=notes,
    )


def _why_unjudged(label: str, floats: list[MeasuredRow]) -> str:
    if not any(row.measured for row in floats):
        return f"{label} has no baseline: no float row could be measured"
    return (
        f"{label} has no baseline: no measured float row runs on the same device; add the float model "
        "for that device as an ONNX folder or an engine: trtq export MODEL -o FLOAT --precision fp16"
    )


def _with_verdict(judged: list[MeasuredRow], verdict: str) -> list[str]:
    """Labels of the rows with this verdict at any batch size, for steps or for whole images."""
    return [
        row.label
        for row in judged
        if any(
            entry[key] and entry[key]["verdict"] == verdict
            for entry in row.batches
            for key in TIMINGS
        )
    ]


def _timed_rows(rows: list[ActiveRow], batch: int) -> Iterator[ActiveRow]:
    for row in rows:
        if row.error is None and DENOISER in row.batches.get(batch, {}).get("parts", {}):
            yield row


def _add_speedups(rows: list[ActiveRow], batch: int, comparisons: int) -> None:
    """Add the speedup of each row over the fastest float row on its device."""
    timed = list(_timed_rows(rows, batch))
    for row in timed:
        for key in TIMINGS:
            row.batches[batch][key] = _speedup(row, timed, batch, key, comparisons)


def _speedup(
    row: ActiveRow, timed: list[ActiveRow], batch: int, key: str, comparisons: int
) -> dict[str, Any] | None:
    """Speedup with its baseline; None without a baseline, and for the fastest float row itself."""

    def timing(other: ActiveRow) -> dict[str, Any]:
        return TIMINGS[key](other.batches[batch])

    rivals = float_rivals(row, timed)
    fastest = min(rivals, key=lambda other: timing(other)["p50"], default=None)
    if fastest is None:
        return None
    if not row.spec.low_bit and timing(row)["p50"] <= timing(fastest)["p50"]:
        return None
    ratio = speedup(timing(fastest)["turns"], timing(row)["turns"], comparisons)
    return {"baseline": fastest.label, **ratio}


def _measured_row(
    row: ActiveRow, rows: list[ActiveRow], plan: Plan, peaks: Mapping[str, Peak | None]
) -> MeasuredRow:
    spec = row.spec
    measured = row.error is None
    first = row.batches[plan.batches[0]] if measured else {}
    return MeasuredRow(
        path=spec.path,
        provider=spec.provider,
        kind=spec.kind,
        bits=spec.bits,
        low_bit=spec.low_bit,
        added=spec.added,
        device=row.device,
        measured=measured,
        reason=row.reason,
        latency_ms=first["parts"][DENOISER] if first else None,
        images_per_second=first["images_per_second"] if first else None,
        images_per_second_interval=first["images_per_second_interval"] if first else None,
        speedup=first["speedup"] if first else None,
        images_speedup=first["images_speedup"] if first else None,
        psnr_db=_psnr(row, rows) if measured else None,
        load_seconds=row.opened.get("load_seconds"),
        build_seconds=spec.build_seconds,
        denoiser_bytes=spec.denoiser_bytes,
        memory=row.memory or None,
        batches=[row.batches[batch] for batch in plan.batches] if measured else [],
        roofline=_roofline(row, plan.batches[0], peaks) if measured else None,
    )


def _psnr(row: ActiveRow, rows: list[ActiveRow]) -> float | None:
    """PSNR in dB of a low-bit row's images relative to those of the first float row."""
    floats = [
        other for other in rows if not other.spec.low_bit and other.images and other.error is None
    ]
    if not row.spec.low_bit or not floats:
        return None
    ours, reference = (torch.from_numpy(np.concatenate(other.images)) for other in (row, floats[0]))
    return psnr_db(ours, reference)


def _roofline(
    row: ActiveRow, batch: int, peaks: Mapping[str, Peak | None]
) -> dict[str, Any] | None:
    key = "cpu"
    if row.device == "gpu":
        key = "gpu low-bit" if row.spec.low_bit else "gpu float"
    peak, operations = peaks[key], row.operations[batch]
    weights = row.opened["weight_bytes"] or row.spec.denoiser_bytes
    if peak is None or not operations or not weights:
        return None
    seconds = row.batches[batch]["parts"][DENOISER]["p50"] / 1e3
    return {**roofline(operations, weights, seconds, peak)}
