"""What people read: ten lines about a file, and where to send it."""

from __future__ import annotations

from collections.abc import Sequence

from trtq.selftest.record import SelftestFile, TrialRow
from trtq.selftest.trials import STAGES

__all__ = ["summary_lines"]

_MAX_FAILURES, _MAX_TEXT = 3, 160


def summary_lines(record: SelftestFile, path: str) -> list[str]:
    """The GPU, each stage, what was skipped and why, the first failures, and where the file goes."""
    gpus = [gpu for gpu in record.gpus if gpu.tested]
    lines = [
        f"{gpu.name}, {gpu.architecture}, {gpu.processors} processors, driver "
        f"{record.machine.get('driver')}"
        for gpu in gpus
    ]
    for stage in STAGES:
        rows = [row for row in record.checks if row.stage == stage.number]
        if rows:
            lines.append(f"{stage.number} {stage.name}: {_counts(rows)}")
    reasons = dict.fromkeys(row.skipped for row in record.checks if row.skipped is not None)
    lines += [f"- skipped: {reason}" for reason in reasons]
    failed = record.failed
    for row in failed[:_MAX_FAILURES]:
        lines.append(f"! {row.name}: {(row.error or '')[:_MAX_TEXT]}")
    if len(failed) > _MAX_FAILURES:
        lines.append(f"! and {len(failed) - _MAX_FAILURES} more, see {path}")
    lines.append("all well" if not failed else f"{len(failed)} of {len(record.checks)} failed")
    lines.append(
        f"Please attach {path} to an issue of the project, also if all is well; it has no names of host "
        "or user and no paths."
    )
    return lines


def _counts(rows: Sequence[TrialRow]) -> str:
    passed = sum(row.ok is True for row in rows)
    failed = sum(row.ok is False for row in rows)
    skipped = sum(row.ok is None for row in rows)
    parts = [f"{passed} passed"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{skipped} skipped"] if skipped else []
    seconds = sum(row.seconds for row in rows)
    return f"{', '.join(parts)}, {seconds:.0f} s"
