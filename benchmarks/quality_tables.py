"""Result files of the quality benchmarks as Markdown: digits, ablation, digits-dit, shapes."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = [
    "ablation",
    "digits",
    "digits_dit",
    "digits_dit_outliers",
    "digits_summary",
    "shapes",
]

WIDTHS = ("W8A8", "W7A8", "W4A8", "W4A4", "W3A4", "mixed")
PER_STEP, STATIC = "W4A4 per-step, search", "W4A4 static, search"
SWAPPED_NAME = "W4A8 search"
SUMMARY = (
    "float",
    "W8A8 per-step, min-max",
    "W4A8 per-step, combined",
    "W4A4 per-step, search",
    "W4A4 per-step, EfficientDM",
    "W4A4 per-step, combined",
    "W3A4 per-step, combined",
)
"""Rows of the README's table."""


def _digits_row(row: dict[str, Any], float_bytes: int) -> str:
    parity = ""
    if "parity_ties" in row:
        minimum = row["parity_db_min"]
        parity = "exact" if minimum >= 200 else f"{minimum:.0f} dB"
        parity += f", {row['parity_ties']:.1%} ties"
    cells = [
        row["name"],
        f"{row['fd']:.2f}",
        f"{row['fd_ratio']:.2f} x" if "fd_ratio" in row else "",
        f"{row['class_accuracy']:.1%}",
        f"{row['fine_tune_seconds']:.0f} s" if row.get("fine_tune_seconds") else "",
        parity,
        f"{row.get('bytes_after', float_bytes) / 1e6:.2f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def digits(record: dict[str, Any]) -> str:
    """`digits.json` as Markdown."""
    provider = record["rows"][-1]["provider"]
    float_bytes = record["rows"][-1]["bytes_before"]
    lines = [
        f"`python benchmarks/digits.py` on {record['device']}, {record['date']}, {record['images']:,} "
        f"images, {record['steps']} DDIM steps, one run; low-bit rows on onnxruntime ({provider}). The "
        "float denoiser's size is that of its parameters in float32.",
        "",
        "| digits model | FD | to float | accuracy | fine-tuning | parity | denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_digits_row(row, float_bytes) for row in record["rows"]),
        "",
        "Per-step tables against one static table, same graph otherwise, median ms of a call "
        "(quartiles), calls interleaved:",
        "",
        "| | per-step | static | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in record["latency_ms"].items():
        ours, base = values[PER_STEP], values[STATIC]
        cells = [f"{v['median']:.2f} ({v['q1']:.2f}-{v['q3']:.2f})" for v in (ours, base)]
        ratio = ours["median"] / base["median"]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.3f} x |")
    return "\n".join(lines)


def digits_summary(record: dict[str, Any]) -> str:
    """The README's selection of `digits.json` as Markdown."""
    rows = {row["name"]: row for row in record["rows"]}
    float_bytes = record["rows"][-1]["bytes_before"]
    lines = [
        f"Digits model, {record['images']:,} images, {record['steps']} DDIM steps; {record['device']}, "
        f"{record['date']}; low-bit rows on onnxruntime ({record['rows'][-1]['provider']}):",
        "",
        "| digits model | FD | to float | class accuracy | denoiser |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SUMMARY:
        row = rows[name]
        cells = [
            name,
            f"{row['fd']:.2f}",
            f"{row['fd_ratio']:.2f} x" if "fd_ratio" in row else "",
            f"{row['class_accuracy']:.1%}",
            f"{row.get('bytes_after', float_bytes) / 1e6:.2f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    """Mean, and smallest and largest where there are several."""
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)}-{format(max(values), form)})"


def ablation(record: dict[str, Any]) -> str:
    """`ablation.json` as Markdown: mean over the seeds, and smallest and largest."""
    low, high = record["fd_float_interval"]
    dates = sorted({row["date"] for row in record["rows"]})
    threads = sorted({row["threads"] for row in record["rows"]})
    lines = [
        f"`python benchmarks/ablation.py`, {dates[-1]}, {record['images']:,} images in torch, "
        f"{' or '.join(map(str, threads))} thread(s). Float: FD {record['fd_float']:.2f} (95 % interval "
        f"{low:.2f}-{high:.2f}), accuracy {record['class_accuracy_float']:.1%}.",
        "",
        "| digits model | seeds | FD | to float | accuracy | PSNR to float |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = dict.fromkeys(row["name"] for row in record["rows"])
    for name in sorted(names, key=lambda name: WIDTHS.index(name.split()[0])):
        rows = [row for row in record["rows"] if row["name"] == name]
        cells = [
            name,
            str(len(rows)),
            _spread([row["fd"] for row in rows], ".2f"),
            f"{statistics.fmean(row['fd_ratio'] for row in rows):.2f} x",
            _spread([row["class_accuracy"] for row in rows], ".1%"),
            _spread([row["psnr_db"] for row in rows], ".1f") + " dB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits_dit(record: dict[str, Any]) -> str:
    """`digits_dit.json` as Markdown."""
    rows = record["rows"]
    low, high = record["fd_float_interval"]
    lines = [
        f"`python benchmarks/digits_dit.py`, {rows[-1]['date']}, {record['images']:,} images in torch, "
        f"{record['steps']} DDIM steps, {rows[-1]['threads']} thread(s). Float: FD "
        f"{record['fd_float']:.2f} (95 % interval {low:.2f}-{high:.2f}), accuracy "
        f"{record['class_accuracy_float']:.1%}, denoiser {rows[-1]['bytes_before'] / 1e6:.2f} MB in "
        "float32.",
        "",
        "| digits-dit model | FD | to float | accuracy | PSNR to float | SNR of the noise prediction "
        "| denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        snr = row["snr_db"]
        cells = [
            row["name"],
            f"{row['fd']:.2f} ({row['fd_interval'][0]:.2f}-{row['fd_interval'][1]:.2f})",
            f"{row['fd_ratio']:.2f} x",
            f"{row['class_accuracy']:.1%}",
            f"{row['psnr_db']:.1f} dB",
            f"{statistics.fmean(snr):.1f} dB (min {min(snr):.1f})",
            f"{row['bytes_after'] / 1e6:.2f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits_dit_outliers(record: dict[str, Any]) -> str:
    """Largest over median channel of the layers' inputs, from `digits_dit.json`, as Markdown."""
    by_layer: dict[str, list[float]] = {}
    for name, ratio in record["outliers"].items():
        head, _, layer = name.partition("transformer_blocks.")
        if head or not layer or ".emb." in name:
            continue
        by_layer.setdefault(layer.partition(".")[2], []).append(ratio)
    blocks = max(map(len, by_layer.values()))
    lines = [
        "| input of | " + " | ".join(f"block {index}" for index in range(blocks)) + " |",
        "| --- |" + " --- |" * blocks,
    ]
    for layer, ratios in by_layer.items():
        lines.append(f"| `{layer}` | " + " | ".join(f"{ratio:.0f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def shapes(record: dict[str, Any]) -> str:
    """`shapes.json` as Markdown."""
    rows = record["rows"]
    low, high = record["faithfulness_float_interval"]
    lines = [
        f"`python benchmarks/shapes.py`, {rows[-1]['date']}, {record['images']:,} pictures, "
        f"{record['steps']} steps, guidance {record['guidance']:g}, {rows[-1]['threads']} thread(s), "
        f"onnxruntime ({rows[-1]['provider']}). Float: faithfulness {record['faithfulness_float']:.1%} "
        f"(95 % interval {low:.1%}-{high:.1%}).",
        "",
        "| shapes model | faithfulness | FD | PSNR to float | parity | fine-tuning | denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = row["fine_tune_seconds"]
        cells = [
            row["name"],
            f"{row['faithfulness']:.1%}",
            f"{row['fd']:.2f}",
            f"{row['psnr_db']:.1f} dB",
            "exact" if row["parity_db_min"] >= 200 else f"{row['parity_db_min']:.0f} dB",
            f"{seconds:.0f} s" if seconds else "",
            f"{row['bytes_after'] / 1e6:.2f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lora = record.get("lora")
    if lora:
        lines += [
            "",
            f"A LoRA that makes every shape purple, exchanged in the finished {SWAPPED_NAME} run in "
            f"{lora['seconds']:.1f} s: purple first shapes in {lora['style_without']:.0%} of "
            f"{lora['images']} pictures without it, {lora['style_float']:.0%} with it in the float "
            f"model, {lora['style_low_bit']:.0%} in the low-bit one. SNR of the noise prediction "
            f"against the float model with the same weights {lora['snr_db_before']:.1f} dB before, "
            f"{lora['snr_db_after']:.1f} dB after.",
        ]
    return "\n".join(lines)
