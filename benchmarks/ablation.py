"""Ablation of the quantisation methods on the digits model; every row is evaluated in torch.

    python benchmarks/ablation.py [--seeds 0 1 2] [--only NAME ...]
    python benchmarks/ablation.py --images 500 --only ... -o benchmarks/results/best.json
    python benchmarks/ablation.py --images 500 --only ... -o benchmarks/results/in_call.json

Rows that are already in the output are skipped, so the script can be interrupted. It does not measure
time (`benchmarks/digits.py` does), so other programs may run at the same time. Fréchet distance and
accuracy use 4,000 images (`--images`) with the same starting noise in every row. QuEST rows have one
activation scale per tensor and step. The authors' 4-bit models have one per input channel and step,
which integer matrix products do not support.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trtq import load
from trtq.artefact.manifest_file import package_versions
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

STEPS = 20
ATTENTION = {"attention": {"quantize": True}}
NO_ROUNDING = {"quest": {"adaround": 0}}
NO_ATTENTION = {"attention": {"quantize": False}}
ROWS: dict[str, dict[str, Any]] = {
    "W8A8 search": {"method": "search", "bits": "w8a8"},
    "W8A8 combined": {"method": "combined", "bits": "w8a8"},
    "W7A8 search": {"method": "search", "bits": "w7a8"},
    "W4A8 search": {"method": "search", "bits": "w4a8"},
    "W4A8 EfficientDM": {"method": "efficientdm", "bits": "w4a8"},
    "W4A8 QuEST": {"method": "quest", "bits": "w4a8"},
    "W4A8 QuEST, rounding off": {"method": "quest", "bits": "w4a8"} | NO_ROUNDING,
    "W4A8 combined": {"method": "combined", "bits": "w4a8"},
    "W4A4 search, static": {"method": "search", "bits": "w4a4", "tables": "static"},
    "W4A4 search": {"method": "search", "bits": "w4a4"},
    "W4A4 EfficientDM, static": {"method": "efficientdm", "bits": "w4a4", "tables": "static"},
    "W4A4 EfficientDM": {"method": "efficientdm", "bits": "w4a4"},
    "W4A4 QuEST": {"method": "quest", "bits": "w4a4"},
    "W4A4 QuEST, rounding off": {"method": "quest", "bits": "w4a4"} | NO_ROUNDING,
    "W4A4 QuEST, rounding off, float attention": {
        "method": "quest",
        "bits": "w4a4",
        **NO_ROUNDING,
        **NO_ATTENTION,
    },
    "W4A4 combined": {"method": "combined", "bits": "w4a4"},
    "W4A4 combined, not smoothed": {"method": "combined", "bits": "w4a4", "smooth": False},
    "W4A4 best, cost of combined": {
        "method": "best",
        "bits": "w4a4",
        "training": {"iterations": 700},
    },
    "W4A4 best": {"method": "best", "bits": "w4a4"},
    "W4A4 combined, attention": {"method": "combined", "bits": "w4a4"} | ATTENTION,
    "W4A4 combined, uniform weights": {
        "method": "combined",
        "bits": "w4a4",
        "training": {"step_weights": "uniform"},
    },
    "W4A4 combined, global loss only": {
        "method": "combined",
        "bits": "w4a4",
        "quest": {"weighting": "global"},
    },
    "W3A4 EfficientDM": {"method": "efficientdm", "bits": "w3a4"},
    "W3A4 QuEST": {"method": "quest", "bits": "w3a4"},
    "W3A4 QuEST, rounding off": {"method": "quest", "bits": "w3a4"} | NO_ROUNDING,
    "W3A4 combined": {"method": "combined", "bits": "w3a4"},
    "mixed 0.13x A4 combined": {"method": "combined", "bits": "w4a4", "budget": "size=0.13x"},
}

IN_CALL = ", in the pipeline's call"
"""End of the names of rows whose model is calibrated and fine-tuned inside its pipeline's own call."""
ROWS |= {f"{name}{IN_CALL}": ROWS[name] for name in ("W4A4 EfficientDM", "W4A4 combined")}


def measured(name: str, seed: int, reference: ReferenceSet, progress: ProgressPrinter) -> Any:
    """Quantise a row's model and evaluate it; the results of both."""
    called = name.endswith(IN_CALL)
    calls = [{"class_labels": [0], "num_inference_steps": STEPS}] if called else None
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        made = quantize("digits", ROWS[name] | {"seed": seed}, run, calls=calls, progress=progress)
        # The Fréchet distance of a recorded run is that of its pipeline.
        judged = load(run) if called else run
        return made, evaluate(judged, reference, progress=progress).to_json()


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/ablation.json")
    )
    arguments = parser.parse_args()
    progress = ProgressPrinter()
    record: dict[str, Any] = {"rows": []}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text())
    reference = draw_reference(
        "digits", images=arguments.images, steps=STEPS, seed=1, progress=progress
    )
    record |= {
        "images": arguments.images,
        "steps": STEPS,
        "fd_float": reference.scores.fd,
        "fd_float_interval": reference.scores.fd_interval,
        "class_accuracy_float": reference.scores.accuracy,
        "packages": package_versions(),
    }
    known = {(row["name"], row["seed"]) for row in record["rows"]}
    for seed in arguments.seeds:
        for name in arguments.only:
            if (name, seed) in known:
                continue
            print(f"== {name}, seed {seed}", file=sys.stderr)
            made, result = measured(name, seed, reference, progress)
            kept = ("fd", "fd_ratio", "fd_interval", "class_accuracy", "psnr_db", "snr_db")
            row = {"name": name, "seed": seed} | {key: result[key] for key in kept}
            row |= {
                key: made.get(key) for key in ("bytes_after", "tuned_share", "fine_tune_seconds")
            }
            row |= {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "threads": torch.get_num_threads(),
            }
            record["rows"].append(row)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")
            print(
                f"{name:34s} seed {seed}  FD {row['fd']:6.2f} ({row['fd_ratio']:.2f} x)  "
                f"accuracy {row['class_accuracy']:.1%}"
            )


if __name__ == "__main__":
    main()
