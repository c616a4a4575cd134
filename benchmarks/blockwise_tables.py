"""The result file of block-wise fine-tuning as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["blockwise"]


def _spread(values: list[float], form: str) -> str:
    """Mean, and smallest and largest where there are several."""
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def _cells(rows: list[dict[str, Any]], whole: int | None) -> list[str]:
    """The cells of all seeds of a model and a name.

    Args:
        rows: the rows.
        whole: memory of the fine-tuning of the whole model, in bytes.
    """
    added = rows[0]["added_bytes"]
    memory = "" if added is None else f"{added / 1e6:.1f} MB"
    if added is not None and whole is not None:
        memory += f" ({added / whole:.2f} x)"
    rated = [row for row in rows if "fd" in row]
    if not rated:
        return ["", "", "", "", memory, ""]
    snr = [statistics.fmean(row["snr_db"]) for row in rated]
    seconds = [row["fine_tune_seconds"] for row in rated]
    return [
        str(len(rated)),
        _spread([row["fd"] for row in rated], ".2f"),
        _spread([row["psnr_db"] for row in rated], ".2f") + " dB",
        _spread(snr, ".2f") + " dB",
        memory,
        "" if seconds[0] is None else f"{statistics.fmean(seconds) / 60:.1f} min",
    ]


def blockwise(record: dict[str, Any]) -> str:
    """`blockwise.json` as Markdown: mean over the seeds, and smallest and largest."""
    rows, training = record["rows"], record["training"]
    last = rows[-1]
    loads = [row["load"] for row in rows]
    lines = [
        f"`python benchmarks/blockwise.py`, {last['date']}, {last['processor']}, EfficientDM at W4A4, "
        f"{training['iterations']} updates of each parameter, {training['batch']} images each; "
        f"{record['images']} images in torch, {record['steps']} steps. {last['threads']} thread(s) at a "
        f"load of {min(loads):.1f} to {max(loads):.1f}, so the times only show an order of magnitude.",
        "",
        "| model | fine-tuning | seeds | FD | PSNR to float | SNR of the prediction | added memory "
        "| time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        wholes = [row["added_bytes"] for row in of_model if row["name"] == "whole model"]
        for name in dict.fromkeys(row["name"] for row in of_model):
            cells = _cells(
                [row for row in of_model if row["name"] == name], wholes[0] if wholes else None
            )
            lines.append("| " + " | ".join([model, name, *cells]) + " |")
    return "\n".join(lines)
