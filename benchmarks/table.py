"""Write the README's table from benchmarks/results/digits.json.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
PER_STEP, STATIC = "W4A4 per-step, search", "W4A4 static, search"


def _row(row: dict[str, Any], float_bytes: int) -> str:
    parity = ""
    if "parity_ties" in row:
        least = row["parity_db_min"]
        parity = "exact" if least >= 200 else f"{least:.0f} dB"
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


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    provider = record["rows"][-1]["provider"]
    float_bytes = record["rows"][-1]["bytes_before"]
    lines = [
        f"`python benchmarks/digits.py` on {record['device']}, {record['date']}, {record['images']:,} "
        f"images, {record['steps']} DDIM steps, one run; low-bit rows on onnxruntime ({provider}). The "
        "float denoiser's size is that of its parameters in float32.",
        "",
        "| digits model | FD | to float | accuracy | fine-tuning | parity | denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(row, float_bytes) for row in record["rows"]),
        "",
        "Per-step tables against one static table, same graph otherwise, median ms of a call "
        "(quartiles), calls in turns:",
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


def main() -> None:
    """Replace what stands between the two marks."""
    record = json.loads((ROOT / "benchmarks" / "results" / "digits.json").read_text())
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    readme.write_text(f"{head}{BEGIN}\n{table(record)}\n{END}{tail}")


if __name__ == "__main__":
    main()
