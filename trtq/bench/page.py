"""Presentation of a benchmark result: summary sentences, gate, and HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trtq.bench.tables import (
    IMAGES_TITLE,
    MEMORY_TITLE,
    STEP_TITLE,
    bench_tables,
    ratio_text,
    row_label,
    short_names,
)
from trtq.report.page import Page, Section, Table, picture
from trtq.report.plots import latency_boxes, model_colours, roofline_plot, throughput_curves

__all__ = ["bench_page", "bench_tables", "failures", "statements"]


def statements(result: Mapping[str, Any]) -> list[str]:
    """Summary sentences: each low-bit row compared with float, missing rows, notes."""
    shared, _ = short_names(result)
    lines = [f"row names in the tables are relative to {shared}"] if shared else []
    for row in result["rows"]:
        if not row["measured"]:
            lines.append(f"{row_label(row)}: not measured: {row['reason']}")
        for entry in row["batches"] if row["low_bit"] else ():
            name, psnr = f"{row_label(row)}, batch {entry['batch']}", ""
            if row["psnr_db"] is not None:
                psnr = f", at {row['psnr_db']:.1f} dB"
            if entry["speedup"] is not None:
                lines.append(f"{name}, one step: {_verdict(entry['speedup'])}")
            if entry["images_speedup"] is not None:
                lines.append(f"{name}, whole images: {_verdict(entry['images_speedup'])}{psnr}")
    against = result["against"]
    if against is not None:
        lines += [f"not compared with {against['file']}: {line}" for line in against["different"]]
        lines += [f"not in both results ({against['file']}): {line}" for line in against["missing"]]
    return lines + [f"note: {note}" for note in result["notes"]]


def _verdict(speedup: Mapping[str, Any]) -> str:
    """Verdict, baseline and ratio, e.g. `faster than digits@torch: 2.00 x (1.90-2.10)`."""
    verdict = {
        "faster": "faster than",
        "slower": "SLOWER than",
        "within the spread": "no significant difference from",
        "too few turns": "too few rounds for a verdict against",
    }[speedup["verdict"]]
    return f"{verdict} {speedup['baseline']}: {ratio_text(speedup)}"


def failures(result: Mapping[str, Any]) -> list[str]:
    """Reasons why the speed gate fails; an empty list if it passes."""
    rows = result["rows"]
    missing = [row_label(row) for row in rows if row["low_bit"] and not row["measured"]]
    reasons = {
        "slower than float": result["slower"],
        "too few rounds for a verdict against float": result["undecided"],
        "not compared with float": result["unjudged"],
        "not measured": missing,
        "no low-bit row": [] if any(row["low_bit"] for row in rows) else ["nothing to compare"],
    }
    return [f"{reason}: {', '.join(labels)}" for reason, labels in reasons.items() if labels]


def bench_page(result: Mapping[str, Any]) -> Page:
    """Build the HTML report of `trtq bench`."""
    device = result["device"]
    _, names = short_names(result)
    measured = {names[row_label(row)]: row for row in result["rows"] if row["measured"]}
    colours = model_colours(names.values())
    words = Table(
        ("compared with float",), tuple((line,) for line in statements(result)), words=True
    )
    sections = [Section("Summary", table=words)]
    sections += [
        Section(
            title[0].upper() + title[1:], _LEGENDS.get(title, ""), replace(table, colours=colours)
        )
        for title, table in bench_tables(result).items()
    ]
    if measured:
        sections += _plots(measured, colours)
    lead = (
        f"{device['cpu']}, {device['threads']} thread(s)"
        + (f", {device['gpu']}, driver {device['driver']}" if device["gpu"] else "")
        + f". {result['steps']} steps, guidance {result['guidance']:g}, seed {result['seed']}, "
        f"{result['turns']} timing rounds, {result['date']}."
    )
    return Page("Benchmark", lead, tuple(sections))


_LEGENDS = {
    STEP_TITLE: (
        "Median duration of one denoiser call (quartiles), including both halves of classifier-free "
        "guidance; p99 needs at least 100 calls. vs float: speedup over the fastest float row on the "
        "same device, with the interval of the median over rounds. Over all comparisons of steps and "
        "images the family-wise false-positive rate is at most 5 %, assuming independent rounds."
    ),
    IMAGES_TITLE: (
        "Text encoder, all denoising steps and VAE decoder. Images per second with the 95 % interval of "
        "the median over batches. PSNR: compared with the float model's images from the same noise."
    ),
    MEMORY_TITLE: (
        "Files: size of the denoiser's files. Weights: resident memory added by loading. Activations: "
        "maximum memory added by calls; the openvino provider compiles during the first call, so its "
        "weights count as activations. Max: peak resident memory of the process, libraries included. "
        "GPU: GPU memory of the process. Of peak: rate of the denoiser's products, relative to the "
        "device's peak."
    ),
}


def _plots(measured: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> list[Section]:
    steps = {label: row["latency_ms"] for label, row in measured.items()}
    curves = {
        label: {entry["batch"]: entry["images_per_second"] for entry in row["batches"]}
        for label, row in measured.items()
    }
    first = next(iter(measured.values()))["batches"][0]["batch"]
    boxes = picture(latency_boxes(steps, colours), f"One denoising step, batch {first}.")
    sections = [Section("Latency", images=(boxes,))]
    if len(next(iter(curves.values()))) > 1:
        images = (picture(throughput_curves(curves, colours), "Whole images, all pipeline parts."),)
        sections.append(Section("Throughput", images=images))
    roofs = {label: row["roofline"] for label, row in measured.items() if row["roofline"]}
    if roofs:
        sources = sorted({roof["peak_is"] for roof in roofs.values()})
        shown = picture(
            roofline_plot(roofs, colours),
            "The distance of a point to its roof is unused performance.",
        )
        sections.append(Section("Roofline", f"Roof: {'; '.join(sources)}.", images=(shown,)))
    return sections
