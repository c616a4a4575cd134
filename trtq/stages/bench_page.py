"""What a measurement looks like: tables for terminal and page, and the sentences that sum it up."""

from __future__ import annotations

from typing import Any

from trtq.report.page import Page, Section, Table, picture
from trtq.report.plots import latency_boxes, roofline_plot, throughput_curves
from trtq.stages.bench_worker import DENOISER

__all__ = ["bench_page", "bench_tables", "failures", "statements"]


def _label(row: dict[str, Any]) -> str:
    return f"{row['path']}@{row['provider']}"


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


def _milliseconds(found: dict[str, Any] | None) -> str:
    """Median and quartiles."""
    return "-" if found is None else f"{found['p50']:.3g} ({found['q1']:.3g}-{found['q3']:.3g})"


def _to_float(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['ratio']:.2f} x ({found['low']:.2f}-{found['high']:.2f})"


def bench_tables(result: dict[str, Any]) -> dict[str, Table]:
    """Speed, other parts, memory, and the comparison with a former result, by title."""
    tables = {"one denoising step and whole images": _speed_table(result)}
    parts = _parts_table(result)
    if parts.rows:
        tables["other parts of the pipeline, ms"] = parts
    tables["loading, memory, share of the device"] = _memory_table(result)
    if result["against"] is not None:
        tables[f"against {result['against']['file']}"] = _history_table(result["against"])
    return tables


def _speed_table(result: dict[str, Any]) -> Table:
    header = ("row", "bits", "batch", "step, ms", "p90", "p99", "to float", "images/s", "PSNR, dB")
    rows = []
    for row in result["rows"]:
        if not row["measured"]:
            rows.append((_label(row), row["bits"], "-", "not measured", *["-"] * 5))
        for one in row["batches"]:
            step = one["parts"][DENOISER]
            cells = (
                _label(row),
                row["bits"],
                str(one["batch"]),
                _milliseconds(step),
                f"{step['p90']:.3g}",
                f"{step['p99']:.3g}",
                _to_float(one["speedup"]),
                f"{one['images_per_second']:.3g}",
                _number(row["psnr_db"], ".1f"),
            )
            rows.append(cells)
    return Table(header, tuple(rows))


def _parts_table(result: dict[str, Any]) -> Table:
    names = [name for row in result["rows"] for one in row["batches"] for name in one["parts"]]
    parts = [name for name in dict.fromkeys(names) if name != DENOISER]
    rows = tuple(
        (_label(row), str(one["batch"]), *(_milliseconds(one["parts"].get(name)) for name in parts))
        for row in result["rows"]
        for one in row["batches"]
        if parts
    )
    return Table(("row", "batch", *parts), rows)


def _memory_table(result: dict[str, Any]) -> Table:
    header = ["row", "load, s", "build, s", "denoiser, MB", "weights, MB", "activations, MB"]
    header += ["peak, MB", "of peak"]
    measured = [row for row in result["rows"] if row["measured"]]
    gpu = any("gpu_bytes" in (row["memory"] or {}) for row in measured)
    energy = any(one["joules_per_image"] for row in measured for one in row["batches"])
    header += ["GPU, MB"] * gpu + ["J per image"] * energy
    rows = []
    for row in result["rows"]:
        memory, roof = row["memory"] or {}, row["roofline"]
        cells = [
            _label(row),
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


def _history_table(against: dict[str, Any]) -> Table:
    header = ("row", "batch", "part", "then, ms", "now, ms", "ratio", "so it is")
    rows = tuple(
        (
            row["row"],
            str(row["batch"]),
            row["part"],
            f"{row['before']:.3g}",
            f"{row['after']:.3g}",
            f"{row['ratio']:.2f} x",
            row["verdict"],
        )
        for row in against["rows"]
    )
    return Table(header, rows)


def statements(result: dict[str, Any]) -> list[str]:
    """What has to be said in words: each low-bit row against float, what is missing, what was added."""
    lines = []
    for row in result["rows"]:
        if not row["measured"]:
            lines.append(f"{_label(row)}: not measured: {row['reason']}")
        for one in row["batches"]:
            found = one["speedup"]
            if not row["low_bit"] or found is None:
                continue
            verdict = {
                "faster": "faster than",
                "slower": "SLOWER than",
                "within the spread": "no faster or slower, beyond the spread, than",
            }[found["verdict"]]
            psnr = "" if row["psnr_db"] is None else f", images at {row['psnr_db']:.1f} dB"
            lines.append(
                f"{_label(row)}, batch {one['batch']}: {verdict} {found['baseline']}: "
                f"{_to_float(found)}{psnr}"
            )
    against = result["against"]
    if against is not None and against["missing"]:
        lines.append(f"not in {against['file']}: {', '.join(against['missing'])}")
    return lines + [f"note: {note}" for note in result["notes"]]


def failures(result: dict[str, Any]) -> list[str]:
    """Why a gate on speed is not met; nothing if it is."""
    rows = result["rows"]
    missing = [_label(row) for row in rows if row["low_bit"] and not row["measured"]]
    reasons = {
        "slower than float": result["slower"],
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
    measured = {_label(row): row for row in result["rows"] if row["measured"]}
    words = Table(("against float",), tuple((line,) for line in statements(result)), words=True)
    sections = [Section("In short", table=words)]
    sections += [
        Section(title[0].upper() + title[1:], _EXPLAINED.get(title, ""), table)
        for title, table in bench_tables(result).items()
    ]
    if measured:
        sections += _plots(measured)
    lead = (
        f"{device['cpu']}, {device['threads']} thread(s)"
        + (f", {device['gpu']}, driver {device['driver']}" if device["gpu"] else "")
        + f". {result['steps']} steps, guidance {result['guidance']:g}, seed {result['seed']}, "
        f"{result['turns']} turns, {result['date']}."
    )
    return Page("Measured side by side", lead, tuple(sections))


_EXPLAINED = {
    "one denoising step and whole images": (
        "Median of a call of the denoiser (quartiles), with both halves of the guidance. To float: "
        "how many times faster than the fastest float row of the same device, with the 95 % interval of "
        "the median over turns. PSNR: this row's images against the float model's, same noise."
    ),
    "loading, memory, share of the device": (
        "Weights: resident memory that loading added. Activations: what calling added at most; the "
        "openvino provider compiles at the first call, so its weights count there. Of peak: the "
        "denoiser's products against the device's peak."
    ),
}


def _plots(measured: dict[str, dict[str, Any]]) -> list[Section]:
    steps = {label: row["latency_ms"] for label, row in measured.items()}
    curves = {
        label: {one["batch"]: one["images_per_second"] for one in row["batches"]}
        for label, row in measured.items()
    }
    first = next(iter(measured.values()))["batches"][0]["batch"]
    boxes = picture(latency_boxes(steps), f"One denoising step, batch {first}.")
    sections = [Section("Latency", images=(boxes,))]
    if len(next(iter(curves.values()))) > 1:
        images = (picture(throughput_curves(curves), "Whole images, all parts."),)
        sections.append(Section("Throughput", images=images))
    roofs = {label: row["roofline"] for label, row in measured.items() if row["roofline"]}
    if roofs:
        text = (
            "The roof is: " + "; ".join(sorted({roof["peak_is"] for roof in roofs.values()})) + "."
        )
        shown = picture(roofline_plot(roofs), "A point below its roof leaves something unused.")
        sections.append(Section("Roofline", text, images=(shown,)))
    return sections
