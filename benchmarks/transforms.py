"""Smoothing, rotation and scale policies: SNR of the noise prediction.

    python benchmarks/transforms.py [--only planted|policies|tuned] [--models NAME ...]
        [--iterations N --batch N]

Three tables. `planted`: random transformers with outlier channels against the same function without
them, for every transform. `policies`: scales per step, per row and the smaller of both, without rotation
and with rotations of at most 64 and 256 channels. Neither is fine-tuned. `tuned`: the default recipes of
the methods that fine-tune, on random transformers with and without outlier channels; `--iterations` and
`--batch` replace those of the recipes. Every number is the mean over the steps of the SNR of the low-bit
model's prediction against the float model's, at the same points of the float model's trajectories. Rows
that are already in the output are skipped. Time is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import trtq
from benchmarks.planted import MODELS, build
from trtq.artefact.manifest_file import package_versions
from trtq.diffusion.loading import open_pipeline
from trtq.evaluation.metrics import noise_prediction_snr

STEPS = 10
IMAGES = 16
BITS = ("w8a8", "w4a8", "w4a4")
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {"smooth": False},
    "smooth": {},
    "rotate 64": {"smooth": False, "rotate": 64},
    "both": {"rotate": 64},
}
METHODS = ("efficientdm", "quest", "combined")
SHIPPED = ("digits", "digits-dit")
SIZES = {"flux": "32x32"}
"""Image sizes of models whose usual size is large."""


def measure(model: str, planted: bool, recipe: dict[str, Any]) -> dict[str, Any]:
    """Quantise a model and measure the mean SNR of its predictions."""
    source = model if model in SHIPPED else build(model, planted=planted)
    settings = {
        "method": "search",
        "steps": STEPS,
        "calibration": {"images": IMAGES, "samples_per_step": 2048},
    }
    size = SIZES.get(model)
    if size is not None:
        settings["size"] = size
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        trtq.quantize(source, settings | recipe, run)
        rows = trtq.inspect(run).to_json()["layers"]
        low_bit = trtq.load(run, provider="torch")
    reference = open_pipeline(model if model in SHIPPED else build(model, planted=planted))
    if size is not None:
        reference = reference.sized(size)
    name = reference.denoiser_name
    reference_pipeline = reference.pipeline
    stand_in = type(reference_pipeline)(
        **reference_pipeline.components | {name: getattr(low_bit, name)}
    )
    low = open_pipeline(stand_in)
    snr = noise_prediction_snr(
        low if size is None else low.sized(size), reference, steps=STEPS, seed=3, images=IMAGES
    )
    done = Counter(
        (row.get("smooth", False), row.get("rotate", 0))
        for row in rows
        if row.get("activation_bits") is not None
    )
    return {
        "snr_db": round(statistics.fmean(snr), 2),
        "snr_db_min": round(min(snr), 2),
        "smoothed": sum(count for (smooth, _), count in done.items() if smooth),
        "rotated": sum(count for (_, rotate), count in done.items() if rotate),
    }


def planted_rows(models: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the first table, without results."""
    for model, bits in itertools.product(models, BITS):
        if model in SHIPPED:
            continue
        for planted, transform in ((False, "none"), *((True, name) for name in TRANSFORMS)):
            yield {"table": "planted", "model": model, "bits": bits, "planted": planted} | {
                "transform": transform
            }


def policy_rows(models: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the second table, without results."""
    for model, bits, scales, rotate in itertools.product(
        models, BITS, ("step", "row", "hybrid"), (0, 64, 256)
    ):
        yield {"table": "policies", "model": model, "bits": bits, "scales": scales} | {
            "rotate": rotate
        }


def tuned_rows(models: list[str], iterations: int, batch: int) -> Iterator[dict[str, Any]]:
    """Rows of the third table, without results."""
    for model, bits, method, planted in itertools.product(
        models, reversed(BITS), METHODS, (False, True)
    ):
        if model in MODELS:
            yield {"table": "tuned", "model": model, "bits": bits, "planted": planted} | {
                "method": method,
                "training": {"iterations": iterations, "batch": batch},
            }


def recipe_of(row: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a row."""
    if row["table"] == "tuned":
        return {key: row[key] for key in ("bits", "method", "training")}
    if row["table"] == "planted":
        return {"bits": row["bits"]} | TRANSFORMS[row["transform"]]
    return {key: row[key] for key in ("bits", "scales", "rotate")}


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["planted", "policies", "tuned"])
    known_models = [*SHIPPED, *MODELS]
    parser.add_argument("--models", nargs="+", choices=known_models, default=known_models)
    parser.add_argument("--iterations", type=int, default=700)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/transforms.json")
    )
    arguments = parser.parse_args()
    record: dict[str, Any] = {"rows": []}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text())
    record |= {"steps": STEPS, "images": IMAGES, "packages": package_versions()}
    results = {"snr_db", "snr_db_min", "smoothed", "rotated", "seconds", "date", "threads"}
    done = [{k: v for k, v in row.items() if k not in results} for row in record["rows"]]
    budget = arguments.iterations, arguments.batch
    rows = {
        "planted": planted_rows,
        "policies": policy_rows,
        "tuned": lambda models: tuned_rows(models, *budget),
    }
    for table in [arguments.only] if arguments.only else ("planted", "policies"):
        for row in rows[table](arguments.models):
            if row in done:
                continue
            row |= measure(row["model"], row.get("planted", False), recipe_of(row))
            row |= {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "threads": torch.get_num_threads(),
            }
            record["rows"].append(row)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")
            print({key: value for key, value in row.items() if key != "date"}, flush=True)


if __name__ == "__main__":
    main()
