"""Tables of `transforms.json` and `calibrators.json` as Markdown."""

from __future__ import annotations

import itertools
from typing import Any

__all__ = [
    "calibration_images",
    "calibrators",
    "transforms_planted",
    "transforms_policies",
    "transforms_tuned",
]

_MODELS = {
    "digits": "digits (UNet)",
    "digits-dit": "digits-dit (DiT)",
    "dit": "DiT, random",
    "pixart": "PixArt, random",
    "sd_3": "SD 3, random",
    "flux": "Flux, random",
}


def _head(record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    dates = sorted({row["date"] for row in rows})
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"`python -m benchmarks.transforms`, {span}, post-training search, {record['steps']} steps, "
        f"{record['images']} images, in torch: mean SNR of the noise prediction in dB."
    )


def transforms_planted(record: dict[str, Any]) -> str:
    """SNR of models with planted outlier channels by transform."""
    rows = [row for row in record["rows"] if row["table"] == "planted"]
    if not rows:
        return "Not measured."
    values = {
        (row["model"], row["bits"], row["planted"], row["transform"]): row["snr_db"] for row in rows
    }
    columns = [(False, "none")] + [(True, name) for name in ("none", "smooth", "rotate 64", "both")]
    lines = [
        _head(record, rows),
        "",
        "| model | bits | no outliers | planted | smoothed | rotated | both |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *_lines(rows, values, columns)])


def _lines(rows: list[dict[str, Any]], values: dict[Any, float], columns: list[Any]) -> list[str]:
    """A line for each model and its bits, with the value of each column."""
    return [
        f"| {_MODELS[model]} | {bits.upper()} | "
        f"{' | '.join(_cell(values.get((model, bits, *column))) for column in columns)} |"
        for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in rows)
    ]


def _cell(snr_db: float | None) -> str:
    return "not measured" if snr_db is None else f"{snr_db:.1f}"


def transforms_policies(record: dict[str, Any]) -> str:
    """SNR by scale policy and rotation."""
    rows = [row for row in record["rows"] if row["table"] == "policies"]
    if not rows:
        return "Not measured."
    values = {
        (row["model"], row["bits"], row["rotate"], row["scales"]): row["snr_db"] for row in rows
    }
    columns = list(itertools.product((0, 64, 256), ("step", "row", "hybrid")))
    names = [scales if not rotate else f"{scales}, {rotate}" for rotate, scales in columns]
    lines = [
        _head(record, rows),
        "",
        f"| model | bits | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
    ]
    return "\n".join([*lines, *_lines(rows, values, columns)])


def transforms_tuned(record: dict[str, Any]) -> str:
    """SNR after fine-tuning, of models with and without planted outlier channels."""
    rows = [row for row in record["rows"] if row["table"] == "tuned"]
    if not rows:
        return "Not measured."
    dates = sorted({row["date"] for row in rows})
    budgets = sorted({(row["training"]["iterations"], row["training"]["batch"]) for row in rows})
    spent = " or ".join(
        f"{iterations} iterations of {batch} images" for iterations, batch in budgets
    )
    lines = [
        f"`python -m benchmarks.transforms --only tuned`, {dates[-1]}, default recipes with {spent}, "
        f"{record['steps']} steps, {record['images']} images, in torch: mean SNR of the noise "
        "prediction in dB.",
        "",
        "| model | bits | method | no outliers | planted | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    values: dict[tuple[str, str, str], dict[bool, float]] = {}
    for row in rows:
        place = row["model"], row["bits"], row["method"]
        values.setdefault(place, {})[row["planted"]] = row["snr_db"]
    for (model, bits, method), pair in values.items():
        plain, planted = pair.get(False), pair.get(True)
        cells = [
            *(_cell(snr) for snr in (plain, planted)),
            "" if plain is None or planted is None else f"{planted - plain:+.1f}",
        ]
        lines.append(f"| {_MODELS[model]} | {bits.upper()} | `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibrators(record: dict[str, Any]) -> str:
    """`calibrators.json` as Markdown: PSNR of the images and mean SNR of the prediction."""
    return _by_calibration(record, "calibrators", "calibrator", "")


def calibration_images(record: dict[str, Any]) -> str:
    """`calibration_images.json` as Markdown, like `calibrators`."""
    return _by_calibration(record, "calibration_images", "calibration_images", " images")


def _by_calibration(record: dict[str, Any], script: str, key: str, unit: str) -> str:
    """One column per value of `key`, which is the header with a unit."""
    rows = record["rows"]
    values = {(row["model"], row["bits"], row[key]): row for row in rows}
    names = list(dict.fromkeys(row[key] for row in rows))
    images = {row["model"]: row["images"] for row in rows}
    dates = sorted({row["date"] for row in rows})
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    counts = ", ".join(f"{model} {count}" for model, count in images.items())
    lines = [
        f"`python benchmarks/{script}.py`, {span}, post-training, {record['steps']} steps, one seed, "
        f"in torch; images: {counts}. Cells: PSNR of the images against float / mean SNR of the "
        "prediction over steps, in dB.",
        "",
        "| model | bits | " + " | ".join(f"{name}{unit}" for name in names) + " |",
        "| --- | --- | " + " | ".join("---" for _ in names) + " |",
    ]
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        cells = [_pair(values.get((model, bits, name))) for name in names]
        lines.append(f"| {model} | {bits.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(row: dict[str, Any] | None) -> str:
    return "not measured" if row is None else f"{row['psnr_db']:.1f} / {row['snr_db']:.1f}"
