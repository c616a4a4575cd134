"""Result files of the speed and memory benchmarks as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["build", "cpu_path", "format_engines", "real_size", "sd_size"]

MODELS = {"sd_1": "SD 1.5, 859.5 M", "sd_xl": "SD XL, 2,567 M"}
KINDS = {
    "float": "float",
    "constant": "W7A8, constant scales",
    "nncf": "int8 by NNCF (W8A8, static)",
}


def sd_size(record: dict[str, Any]) -> str:
    """`sd_size.json` as Markdown."""
    lines = [
        "| UNet | run | stage | seconds | peak memory | run's denoiser to float32 | threads, date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        options, made = row["options"], row.get("quantize")
        what = f"{options['bits'].upper()} {options['method']}, {options['steps']} step(s), "
        what += f"{options['images']} image(s)"
        if options["iterations"] is not None:
            what += f", {options['iterations']} iterations of {options['batch']} image(s)"
        size = f"{made['bytes_after'] / made['bytes_before']:.3f} x" if made else ""
        for stage in ("quantize", "export"):
            if stage in row:
                cells = [
                    MODELS[options["model"]],
                    what,
                    stage,
                    f"{row[stage]['seconds']:.0f}",
                    f"{row[stage]['peak_rss_bytes'] / 1e9:.1f} GB",
                    size if stage == "quantize" else "",
                    f"{row['threads']}, {row['date']}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def launches(record: dict[str, Any]) -> str:
    """`launches.json` as Markdown."""
    first = record["rows"][0]
    counts = ("launches", "launches_fused_attention")
    lines = [
        f"`python benchmarks/launches.py`, {record['bits'].upper()}, half precision, "
        f"{record['date']}. Counted from the graph by the rules of `trtq.graph.launches`, not measured.",
        "",
        "| graph | launches per step | to the first row | attention is one launch | to the first row |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        name = row["rewrite"] if row is first else f"and `{row['rewrite']}`"
        cells = [f"{row[key]} | {row[key] / first[key]:.2f} x" for key in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def build(record: dict[str, Any]) -> str:
    """`build.json` as Markdown."""
    whole = {
        tuple(row["architectures"]): row["engine_bytes"]
        for row in record["rows"]
        if row["graph"] == "float"
    }
    lines = [
        f"`python benchmarks/build.py`, {record['device']}, no GPU, {record['builder']}, "
        f"{record['date']}, batch 1-8, half precision.",
        "",
        "| UNet | built for | seconds | peak memory | engine | to the float engine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = [
            row["graph"],
            ", ".join(row["architectures"]),
            f"{row['seconds']:.0f}",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
            f"{row['engine_bytes'] / 1e6:.0f} MB",
            f"{row['engine_bytes'] / whole[tuple(row['architectures'])]:.2f} x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_path(record: dict[str, Any]) -> str:
    """`cpu_path.json` as Markdown."""
    median = {(row["name"], row["provider"]): row["median_seconds"] for row in record["rows"]}
    lines = [
        f"`python benchmarks/cpu_path.py`, {record['device']} "
        f"{'with' if record['vnni'] else 'without'} VNNI, {record['threads']} threads, "
        f"{record['date']}, one run, rows interleaved: seconds of one call, batch 1, median "
        "(quartiles).",
        "",
        "| UNet | runs on | seconds | against float on cpu | against float on openvino | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        seconds, (low, high) = row["median_seconds"], row["quartiles"]
        cells = [
            KINDS.get(row["name"], row["name"].upper()),
            "openvino's own runtime" if row["name"] == "nncf" else row["provider"],
            f"{seconds:.2f} ({low:.2f}-{high:.2f})",
            f"{median['float', 'cpu'] / seconds:.2f} x",
            f"{median['float', 'openvino'] / seconds:.2f} x",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    pair = record.get("pair")
    if pair:
        low, high = pair["quartiles"]
        lines += [
            "",
            "Per-step against constant scales, both in one process, calls interleaved, "
            f"{pair['calls']} times: {pair['ratio']:.3f} x ({low:.3f}-{high:.3f}).",
        ]
    return "\n".join(lines)


FORM_MODELS = {
    "digits-dit": "shipped transformer",
    "sd_1": "UNet of SD 1.5's size",
    "dit_1b": "DiT, 1.15 B parameters",
}


def format_engines(record: dict[str, Any]) -> str:
    """`format_engines.json` as Markdown."""
    lines = [
        f"`python benchmarks/format_engines.py`, {record['device']}, no GPU, {record['builder']}, half "
        "precision.",
        "",
        "| model | layers | low-bit | rotated | built for | engine | to the float engine | parity, dB "
        "| date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = {
        (row["model"], tuple(row["architectures"])): row["engine_bytes"]
        for row in record["rows"]
        if row["form"] == "float"
    }
    for row in record["rows"]:
        reference = whole.get((row["model"], tuple(row["architectures"])))
        ratio = (
            "*not measured*" if reference is None else f"{row['engine_bytes'] / reference:.2f} x"
        )
        cells = [
            FORM_MODELS[row["model"]],
            row["form"],
            f"{row['low_bit']} of {row['layers']}",
            str(row["rotated"]),
            ", ".join(row["architectures"]),
            f"{row['engine_bytes'] / 1e6:,.1f} MB",
            ratio,
            f"{row['parity_db_min']:.0f}",
            row["date"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real_size(record: dict[str, Any]) -> str:
    """`real_size.json` as Markdown."""
    lines = [
        "`python benchmarks/real_size.py`, random weights, W4A8 with rotation, min-max, one image of "
        "256 x 256 pixels, two steps. A load above the number of threads means that other programs "
        "ran, too.",
        "",
        "| denoiser | parameters | command | `--memory` | peak | time | size, of half precision | "
        "measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        cells = [
            {"sd_xl": "SDXL UNet", "flux": "Flux transformer"}[row["model"]],
            f"{row['parameters'] / 1e9:.1f} billion",
            row["command"],
            row["memory"],
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
            f"{row['seconds'] / 60:.0f} min, {row['threads']} threads, load {row['load']:.1f}",
            f"{row['share']:.2f} x",
            f"{row['device']}, {row['date']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
