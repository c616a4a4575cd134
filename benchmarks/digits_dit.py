"""The digits-dit model at several bit widths: what outlier channels cost a transformer.

    python benchmarks/digits_dit.py [--images 1000] [--only NAME ...] [--model FOLDER -o FILE]

Every row is quantised and evaluated in torch. Rows that are already in the output are skipped, so the
script can be interrupted. It does not measure time, so other programs may run at the same time. Every
row starts from the same noise. `--model` measures another training of the model, e.g. one without
planted outliers (`python -m trtq.demo.train_digits_dit --factor 1`).
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

from trtq.artefact.manifest_file import package_versions
from trtq.demo.outliers import channel_ratios
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.pipelines.draw import conditioning_for, draw
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

MODEL = "digits-dit"
STEPS = 20
PLAIN = {"smooth": False}
ROTATED = {"rotate": 64}
SHORT = {"training": {"iterations": 200, "batch": 20}}
ROWS: dict[str, dict[str, Any]] = {
    "W8A8 min-max, not smoothed": {"method": "minmax", "bits": "w8a8"} | PLAIN,
    "W8A8 min-max": {"method": "minmax", "bits": "w8a8"},
    "W8A8 search": {"method": "search", "bits": "w8a8"},
    "W4A8 search": {"method": "search", "bits": "w4a8"},
    "W4A4 search, static": {"method": "search", "bits": "w4a4", "tables": "static"},
    "W4A4 search, not smoothed": {"method": "search", "bits": "w4a4"} | PLAIN,
    "W4A4 search": {"method": "search", "bits": "w4a4"},
    "W4A4 search, rotated": {"method": "search", "bits": "w4a4"} | ROTATED,
    "W4A4 search, row scales": {"method": "search", "bits": "w4a4", "scales": "row"},
    "W4A4 search, rotated, row scales": {
        "method": "search",
        "bits": "w4a4",
        "scales": "row",
        **ROTATED,
    },
    "W4A4 search, rotated, hybrid scales": {
        "method": "search",
        "bits": "w4a4",
        "scales": "hybrid",
        **ROTATED,
    },
    "FP8 search": {"method": "search", "bits": "w8a8", "format": "fp8"},
    "NVFP4 search": {"method": "search", "bits": "w4a4", "format": "nvfp4"},
    "W4A16 search": {"method": "search", "bits": "w4a16"},
    "W4A4 EfficientDM": {"method": "efficientdm", "bits": "w4a4"},
    "W4A4 combined": {"method": "combined", "bits": "w4a4"},
    "W4A4 best": {"method": "best", "bits": "w4a4"},
    "W4A4 best, 200 iterations of 20": {"method": "best", "bits": "w4a4"} | SHORT,
}


def outliers(reference: ReferenceSet) -> dict[str, float]:
    """Largest over median channel of every linear layer's input, by layer; 20 images."""
    source = reference.source
    conditioning = conditioning_for(source, 20)
    return channel_ratios(
        source.denoiser, lambda: draw(source, conditioning, steps=STEPS, seed=reference.seed)
    )


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/digits_dit.json")
    )
    arguments = parser.parse_args()
    progress = ProgressPrinter()
    record: dict[str, Any] = {"rows": []}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text())
    model = arguments.model
    reference = draw_reference(
        model, images=arguments.images, steps=STEPS, seed=1, progress=progress
    )
    record |= {
        "images": arguments.images,
        "steps": STEPS,
        "fd_float": reference.scores.fd,
        "fd_float_interval": reference.scores.fd_interval,
        "class_accuracy_float": reference.scores.accuracy,
        "outliers": outliers(reference),
        "packages": package_versions(),
    }
    known = {row["name"] for row in record["rows"]}
    for name in arguments.only:
        if name in known:
            continue
        print(f"== {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            run = Path(scratch) / "run"
            made = quantize(model, ROWS[name], run, progress=progress)
            result = evaluate(run, reference, progress=progress).to_json()
        kept = ("fd", "fd_ratio", "fd_interval", "class_accuracy", "psnr_db", "snr_db")
        row = {"name": name} | {key: result[key] for key in kept}
        row |= {key: made.get(key) for key in ("bytes_before", "bytes_after")}
        row |= {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
        }
        record["rows"].append(row)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        print(
            f"{name:22s} FD {row['fd']:6.2f} ({row['fd_ratio']:.2f} x)  "
            f"accuracy {row['class_accuracy']:.1%}  PSNR {row['psnr_db']:.1f} dB"
        )


if __name__ == "__main__":
    main()
