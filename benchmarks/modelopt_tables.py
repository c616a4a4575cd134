"""Tables of `modelopt.json` as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["modelopt"]

_BITS = ("w8a8", "w4a8", "w4a4", "fp8")


def modelopt(record: dict[str, Any]) -> str:
    """Quality, size and form of the file, by model and bits."""
    rows = sorted(
        record["rows"],
        key=lambda row: (row["model"], _BITS.index(row["bits"]), row["by"] != "trtq"),
    )
    dates = sorted({row["date"] for row in rows})
    floats = ", ".join(
        f"{model} FD {each['fd']:.2f}, accuracy {each['accuracy']:.1%} ({each['images']} images, "
        f"{each['steps']} steps, calibrated on {each['calibration']} images)"
        for model, each in record["float"].items()
    )
    lines = [
        f"`python benchmarks/modelopt.py`, {dates[-1]}, nvidia-modelopt "
        f"{record['packages']['nvidia-modelopt']}, in torch. Float: {floats}.",
        "",
        "| model | bits | row | bits per weight | SNR of the noise prediction | PSNR | FD | accuracy "
        "| file | what reached the file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, rows),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    tuned = row["by"] == "trtq" and not row["post_training"]
    name = row["name"].removeprefix(f"trtq {row['bits']}, ")
    name = f"**trtq**, {name}" if row["by"] == "trtq" else f"ModelOpt {name.split(', ')[-1]}"
    if tuned:
        name += f" ({row['recipe']})"
    weight = f"{row['weight_bits']:.1f}" if "weight_bits" in row else ""
    cells = [row["model"], row["bits"].upper(), name, weight]
    if "snr_db" in row:
        accuracy = row.get("class_accuracy", row.get("faithfulness"))
        cells += [
            f"{statistics.fmean(row['snr_db']):.1f} dB (min {min(row['snr_db']):.1f})",
            f"{row['psnr_db']:.1f} dB",
            f"{row['fd']:.2f}",
            "" if accuracy is None else f"{accuracy:.1%}",
        ]
    else:
        cells += ["", "", "", ""]
    size = f"{row['bytes'] / 1e6:.2f} MB" if "bytes" in row else ""
    if "bytes" not in row and "packed_bytes" in row:
        size = f"{row['packed_bytes'] / 1e6:.2f} MB (run)"
    what = row["reached"] + ("" if row.get("loads", True) else "; onnxruntime cannot load it")
    return "| " + " | ".join([*cells, size, what]) + " |"
