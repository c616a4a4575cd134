"""Tables of a benchmark result, for the terminal and for the HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtq.bench.measured import DENOISER
from trtq.report.page import Table

__all__ = [
    "IMAGES_TITLE",
    "MEMORY_TITLE",
    "STEP_TITLE",
    "bench_tables",
    "ratio_text",
    "row_label",
    "short_names",
]

STEP_TITLE = "one denoising step"
IMAGES_TITLE = "whole images"
MEMORY_TITLE = "loading, memory in MB, share of the peak"


def row_label(row: Mapping[str, Any]) -> str:
    """`PATH@PROVIDER` of a row."""
    return f"{row['path']}@{row['provider']}"


def short_names(result: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Find the common parent folder of all paths, and make the row names relative to it.

    Returns:
        The folder, or an empty text if there is none; short names by label.
    """
    paths = {row["path"] for row in result["rows"]}
    folders = {path for path in paths if os.sep in str(Path(path))}
    same_kind = len({Path(path).is_absolute() for path in folders}) == 1
    shared = os.path.commonpath([Path(path).parent for path in folders]) if same_kind else ""
    short = {
        path: os.path.relpath(path, shared or ".") if path in folders else path for path in paths
    }
    if shared in ("", os.sep) or len(set(short.values())) < len(paths):
        shared, short = "", {path: path for path in paths}
    return shared, {
        row_label(row): f"{short[row['path']]}@{row['provider']}" for row in result["rows"]
    }


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


def _milliseconds(summary: Mapping[str, Any] | None) -> str:
    """Median and quartiles as text."""
    if summary is None:
        return "-"
    return f"{summary['p50']:.3g} ({summary['q1']:.3g}-{summary['q3']:.3g})"


def ratio_text(speedup: Mapping[str, Any] | None) -> str:
    """The ratio and its interval as text."""
    if speedup is None:
        return "-"
    interval = "" if speedup["low"] is None else f" ({speedup['low']:.2f}-{speedup['high']:.2f})"
    return f"{speedup['ratio']:.2f} x{interval}"


def bench_tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Tables by title: speed, other pipeline parts, memory, comparison with an earlier result."""
    _, names = short_names(result)
    tables = {
        STEP_TITLE: _step_table(result, names),
        IMAGES_TITLE: _images_table(result, names),
    }
    parts = _parts_table(result, names)
    if parts.rows:
        tables["other parts of the pipeline, ms"] = parts
    tables[MEMORY_TITLE] = _memory_table(result, names)
    if result["against"] is not None:
        tables[f"compared with {result['against']['file']}"] = _history_table(
            result["against"], names
        )
    return tables


def _step_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    header = ("row", "bits", "batch", "step, ms", "p90", "p99", "calls", "vs float")
    rows = []
    for row in result["rows"]:
        name = names[row_label(row)]
        if not row["measured"]:
            rows.append((name, row["bits"], "-", "not measured", *["-"] * 4))
        for entry in row["batches"]:
            step = entry["parts"][DENOISER]
            cells = (
                name,
                row["bits"],
                str(entry["batch"]),
                _milliseconds(step),
                f"{step['p90']:.3g}",
                "not measured" if step["p99"] is None else f"{step['p99']:.3g}",
                str(step["calls"]),
                ratio_text(entry["speedup"]),
            )
            rows.append(cells)
    return Table(header, tuple(rows))


def _images_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    header = ("row", "batch", "images/s", "batches", "vs float", "PSNR, dB")
    rows = tuple(
        (
            names[row_label(row)],
            str(entry["batch"]),
            _rate(entry["images_per_second"], entry["images_per_second_interval"]),
            str(entry["batch_of_images"]["calls"]),
            ratio_text(entry["images_speedup"]),
            _number(row["psnr_db"], ".1f"),
        )
        for row in result["rows"]
        for entry in row["batches"]
    )
    return Table(header, rows)


def _rate(value: float, interval: list[float] | None) -> str:
    """The number of images per second and its interval as text."""
    return f"{value:.3g}" + ("" if interval is None else f" ({interval[0]:.3g}-{interval[1]:.3g})")


def _parts_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    names_of_parts = dict.fromkeys(
        name for row in result["rows"] for entry in row["batches"] for name in entry["parts"]
    )
    parts = [name for name in names_of_parts if name != DENOISER]
    rows = tuple(
        (
            names[row_label(row)],
            str(entry["batch"]),
            *(_milliseconds(entry["parts"].get(name)) for name in parts),
        )
        for row in result["rows"]
        for entry in row["batches"]
        if parts
    )
    return Table(("row", "batch", *parts), rows)


def _memory_table(result: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    header = ["row", "load, s", "build, s", "files", "weights", "activations", "max", "of peak"]
    measured = [row for row in result["rows"] if row["measured"]]
    gpu = any("gpu_bytes" in (row["memory"] or {}) for row in measured)
    energy = any(entry["joules_per_image"] for row in measured for entry in row["batches"])
    header += ["GPU"] * gpu + ["J per image"] * energy
    rows = []
    for row in result["rows"]:
        memory, roof = row["memory"] or {}, row["roofline"]
        cells = [
            names[row_label(row)],
            _number(row["load_seconds"], ".2f"),
            _number(row["build_seconds"], ".1f"),
            _number(row["denoiser_bytes"], ".2f", 1e-6),
            _number(memory.get("weights_bytes"), ".0f", 1e-6),
            _number(memory.get("activations_bytes"), ".0f", 1e-6),
            _number(memory.get("peak_bytes"), ".0f", 1e-6),
            _share(roof) if row["measured"] else "-",
        ]
        cells += [_number(memory.get("gpu_bytes"), ".0f", 1e-6)] * gpu
        first = row["batches"][0]["joules_per_image"] if row["batches"] else None
        rows.append((*cells, *[_number(first, ".3g")] * energy))
    return Table(tuple(header), tuple(rows))


def _share(roof: Mapping[str, Any] | None) -> str:
    return "unknown" if roof is None else f"{roof['peak_share']:.1%}"


def _history_table(against: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    header = ("row", "batch", "quantity", "before", "now", "ratio", "verdict")
    rows = tuple(
        (
            names[row["row"]],
            "-" if row["batch"] is None else str(row["batch"]),
            f"{row['what']}, {row['unit']}",
            f"{row['before']:.3g}",
            f"{row['after']:.3g}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f} x",
            row["verdict"],
        )
        for row in against["rows"]
    )
    return Table(header, rows)
