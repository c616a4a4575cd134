"""What a measurement looks like: tables for terminal and page, and the sentences that sum it up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtq.bench.worker import DENOISER
from trtq.report.page import Page, Section, Table, picture
from trtq.report.plots import latency_boxes, model_colours, roofline_plot, throughput_curves

__all__ = ["bench_page", "bench_tables", "failures", "statements"]

STEP_TITLE = "one denoising step"
IMAGES_TITLE = "whole images"
MEMORY_TITLE = "loading, memory in MB, share of the device"


def _label(row: dict[str, Any]) -> str:
    return f"{row['path']}@{row['provider']}"


def _short_names(result: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The folder that all paths share, or nothing; and names of rows without it, by label."""
    paths = {row["path"] for row in result["rows"]}
    folders = {path for path in paths if os.sep in str(Path(path))}
    alike = len({Path(path).is_absolute() for path in folders}) == 1
    shared = os.path.commonpath([Path(path).parent for path in folders]) if alike else ""
    short = {
        path: os.path.relpath(path, shared or ".") if path in folders else path for path in paths
    }
    if shared in ("", os.sep) or len(set(short.values())) < len(paths):
        shared, short = "", {path: path for path in paths}
    return shared, {
        _label(row): f"{short[row['path']]}@{row['provider']}" for row in result["rows"]
    }


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


def _milliseconds(found: dict[str, Any] | None) -> str:
    """Median and quartiles."""
    return "-" if found is None else f"{found['p50']:.3g} ({found['q1']:.3g}-{found['q3']:.3g})"


def _to_float(found: dict[str, Any] | None) -> str:
    """Ratio and its interval."""
    if found is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.2f}-{found['high']:.2f})"
    return f"{found['ratio']:.2f} x{interval}"


def bench_tables(result: dict[str, Any]) -> dict[str, Table]:
    """Speed, other parts, memory, and the comparison with a former result, by title."""
    _, names = _short_names(result)
    tables = {
        STEP_TITLE: _step_table(result, names),
        IMAGES_TITLE: _images_table(result, names),
    }
    parts = _parts_table(result, names)
    if parts.rows:
        tables["other parts of the pipeline, ms"] = parts
    tables[MEMORY_TITLE] = _memory_table(result, names)
    if result["against"] is not None:
        tables[f"against {result['against']['file']}"] = _history_table(result["against"], names)
    return tables


def _step_table(result: dict[str, Any], names: dict[str, str]) -> Table:
    header = ("row", "bits", "batch", "step, ms", "p90", "p99", "calls", "to float")
    rows = []
    for row in result["rows"]:
        name = names[_label(row)]
        if not row["measured"]:
            rows.append((name, row["bits"], "-", "not measured", *["-"] * 4))
        for one in row["batches"]:
            step = one["parts"][DENOISER]
            cells = (
                name,
                row["bits"],
                str(one["batch"]),
                _milliseconds(step),
                f"{step['p90']:.3g}",
                "not measured" if step["p99"] is None else f"{step['p99']:.3g}",
                str(step["calls"]),
                _to_float(one["speedup"]),
            )
            rows.append(cells)
    return Table(header, tuple(rows))


def _images_table(result: dict[str, Any], names: dict[str, str]) -> Table:
    header = ("row", "batch", "images/s", "draws", "to float", "PSNR, dB")
    rows = tuple(
        (
            names[_label(row)],
            str(one["batch"]),
            _rate(one["images_per_second"], one["images_per_second_interval"]),
            str(one["batch_of_images"]["calls"]),
            _to_float(one["images_speedup"]),
            _number(row["psnr_db"], ".1f"),
        )
        for row in result["rows"]
        for one in row["batches"]
    )
    return Table(header, rows)


def _rate(value: float, interval: list[float] | None) -> str:
    """Images per second and the interval of their median."""
    return f"{value:.3g}" + ("" if interval is None else f" ({interval[0]:.3g}-{interval[1]:.3g})")


def _parts_table(result: dict[str, Any], names: dict[str, str]) -> Table:
    found = [name for row in result["rows"] for one in row["batches"] for name in one["parts"]]
    parts = [name for name in dict.fromkeys(found) if name != DENOISER]
    rows = tuple(
        (
            names[_label(row)],
            str(one["batch"]),
            *(_milliseconds(one["parts"].get(name)) for name in parts),
        )
        for row in result["rows"]
        for one in row["batches"]
        if parts
    )
    return Table(("row", "batch", *parts), rows)


def _memory_table(result: dict[str, Any], names: dict[str, str]) -> Table:
    header = ["row", "load, s", "build, s", "files", "weights", "activations", "most", "of peak"]
    measured = [row for row in result["rows"] if row["measured"]]
    gpu = any("gpu_bytes" in (row["memory"] or {}) for row in measured)
    energy = any(one["joules_per_image"] for row in measured for one in row["batches"])
    header += ["GPU"] * gpu + ["J per image"] * energy
    rows = []
    for row in result["rows"]:
        memory, roof = row["memory"] or {}, row["roofline"]
        cells = [
            names[_label(row)],
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


def _share(roof: dict[str, Any] | None) -> str:
    return "not known" if roof is None else f"{roof['peak_share']:.1%}"


def _history_table(against: dict[str, Any], names: dict[str, str]) -> Table:
    header = ("row", "batch", "what", "then", "now", "ratio", "so it is")
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


def statements(result: dict[str, Any]) -> list[str]:
    """What has to be said in words: each low-bit row against float, what is missing, what was added."""
    shared, _ = _short_names(result)
    lines = [f"names in the tables are below {shared}"] if shared else []
    for row in result["rows"]:
        if not row["measured"]:
            lines.append(f"{_label(row)}: not measured: {row['reason']}")
        for one in row["batches"] if row["low_bit"] else ():
            name, psnr = f"{_label(row)}, batch {one['batch']}", ""
            if row["psnr_db"] is not None:
                psnr = f", at {row['psnr_db']:.1f} dB"
            if one["speedup"] is not None:
                lines.append(f"{name}, one step: {_against_float(one['speedup'])}")
            if one["images_speedup"] is not None:
                lines.append(f"{name}, whole images: {_against_float(one['images_speedup'])}{psnr}")
    against = result["against"]
    if against is not None:
        lines += [f"not compared with {against['file']}: {line}" for line in against["different"]]
        lines += [f"not on both sides of {against['file']}: {line}" for line in against["missing"]]
    return lines + [f"note: {note}" for note in result["notes"]]


def _against_float(found: dict[str, Any]) -> str:
    verdict = {
        "faster": "faster than",
        "slower": "SLOWER than",
        "within the spread": "no faster or slower, beyond the spread, than",
        "too few turns": "too few turns to tell it from",
    }[found["verdict"]]
    return f"{verdict} {found['baseline']}: {_to_float(found)}"


def failures(result: dict[str, Any]) -> list[str]:
    """Why a gate on speed is not met; nothing if it is."""
    rows = result["rows"]
    missing = [_label(row) for row in rows if row["low_bit"] and not row["measured"]]
    reasons = {
        "slower than float": result["slower"],
        "too few turns to tell it from float": result["undecided"],
        "not compared with float": result["unjudged"],
        "not measured": missing,
        "no low-bit row at all": []
        if any(row["low_bit"] for row in rows)
        else ["nothing to judge"],
    }
    return [f"{reason}: {', '.join(labels)}" for reason, labels in reasons.items() if labels]


def bench_page(result: dict[str, Any]) -> Page:
    """The report of `trtq bench`."""
    device = result["device"]
    _, names = _short_names(result)
    measured = {names[_label(row)]: row for row in result["rows"] if row["measured"]}
    colours = model_colours(names.values())
    words = Table(("against float",), tuple((line,) for line in statements(result)), words=True)
    sections = [Section("In short", table=words)]
    sections += [
        Section(
            title[0].upper() + title[1:], _EXPLAINED.get(title, ""), replace(table, colours=colours)
        )
        for title, table in bench_tables(result).items()
    ]
    if measured:
        sections += _plots(measured, colours)
    lead = (
        f"{device['cpu']}, {device['threads']} thread(s)"
        + (f", {device['gpu']}, driver {device['driver']}" if device["gpu"] else "")
        + f". {result['steps']} steps, guidance {result['guidance']:g}, seed {result['seed']}, "
        f"{result['turns']} turns, {result['date']}."
    )
    return Page("Measured side by side", lead, tuple(sections))


_EXPLAINED = {
    STEP_TITLE: (
        "Median of a call of the denoiser (quartiles), with both halves of the guidance; p99 from 100 "
        "calls on. To float: how many times faster than the fastest float row of the same device, with "
        "the interval of the median over turns: all of these intervals, of steps and images, hold "
        "together with 95 % confidence."
    ),
    IMAGES_TITLE: (
        "Text encoder, all steps and autoencoder. Images per second with the 95 % interval of the "
        "median over draws; to float as above. PSNR: against the float model's images, same noise."
    ),
    MEMORY_TITLE: (
        "Files: the denoiser's. Weights: resident memory that loading added. Activations: what calling "
        "added at most; the openvino provider compiles at the first call, so its weights count there. "
        "Most: the highest of the process, libraries included. GPU: what the process has there. "
        "Of peak: the denoiser's products against the device's peak."
    ),
}


def _plots(measured: dict[str, dict[str, Any]], colours: dict[str, str]) -> list[Section]:
    steps = {label: row["latency_ms"] for label, row in measured.items()}
    curves = {
        label: {one["batch"]: one["images_per_second"] for one in row["batches"]}
        for label, row in measured.items()
    }
    first = next(iter(measured.values()))["batches"][0]["batch"]
    boxes = picture(latency_boxes(steps, colours), f"One denoising step, batch {first}.")
    sections = [Section("Latency", images=(boxes,))]
    if len(next(iter(curves.values()))) > 1:
        images = (picture(throughput_curves(curves, colours), "Whole images, all parts."),)
        sections.append(Section("Throughput", images=images))
    roofs = {label: row["roofline"] for label, row in measured.items() if row["roofline"]}
    if roofs:
        text = (
            "The roof is: " + "; ".join(sorted({roof["peak_is"] for roof in roofs.values()})) + "."
        )
        shown = picture(
            roofline_plot(roofs, colours), "A point below its roof leaves something unused."
        )
        sections.append(Section("Roofline", text, images=(shown,)))
    return sections
