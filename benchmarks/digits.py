"""The digits model at several bit widths: quality, parity, size and latency.

    python benchmarks/digits.py [--images 1000] [--output benchmarks/results/digits.json]

Every low-bit row is quantised, exported and evaluated with onnxruntime; the float row runs in torch.
The latencies of per-step and static scales are those of otherwise equal graphs, called in interleaved
rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtq.artefact.manifest_file import package_versions
from trtq.bench.device import cpu_name
from trtq.bench.summary import summarize
from trtq.bench.turns import take_turns
from trtq.engine.open import open_engine
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.exporter.export import export
from trtq.processor import processor_features
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

STEPS = 20
ROWS: dict[str, dict[str, Any]] = {
    "W8A8 per-step, min-max": {"method": "minmax", "bits": "w8a8"},
    "W4A8 per-step, search": {"method": "search", "bits": "w4a8"},
    "W4A8 per-step, combined": {"method": "combined", "bits": "w4a8"},
    "W4A4 static, min-max": {"method": "minmax", "bits": "w4a4", "tables": "static"},
    "W4A4 static, search": {"method": "search", "bits": "w4a4", "tables": "static"},
    "W4A4 per-step, search": {"method": "search", "bits": "w4a4"},
    "W4A4 per-step, QuEST": {"method": "quest", "bits": "w4a4"},
    "W4A4 per-step, QuEST, rounding off": {
        "method": "quest",
        "bits": "w4a4",
        "quest": {"adaround": 0},
    },
    "W4A4 per-step, EfficientDM": {"method": "efficientdm", "bits": "w4a4"},
    "W4A4 per-step, combined": {"method": "combined", "bits": "w4a4"},
    "W4A4 best": {"method": "best", "bits": "w4a4"},
    "W3A4 per-step, combined": {"method": "combined", "bits": "w3a4"},
}
PER_STEP, STATIC = "W4A4 per-step, search", "W4A4 static, search"


def latencies(folders: dict[str, Path], provider: str, batch: int, rounds: int) -> dict[str, Any]:
    """Median and quartiles of one denoiser call in ms, by name, from interleaved rounds."""
    engines = {
        name: open_engine(folder / "unet" / "model.onnx", provider)
        for name, folder in folders.items()
    }
    random = np.random.default_rng(0)
    feeds = {
        "sample": random.standard_normal((batch, 1, 8, 8)).astype(np.float32),
        "timestep": np.full(batch, 451, np.float32),
        "class_labels": np.arange(batch) % 10,
    }
    calls = {name: partial(engine.run, feeds) for name, engine in engines.items()}
    rows = {
        name: summarize([[value] for value in seconds])
        for name, seconds in take_turns(calls, rounds, warm_up=10).items()
    }
    return {
        name: {"q1": row["q1"], "median": row["p50"], "q3": row["q3"]} for name, row in rows.items()
    }


def measure_rows(
    reference: ReferenceSet, scratch: Path, provider: str, progress: ProgressPrinter
) -> list[dict[str, Any]]:
    """Quantise, export and evaluate every low-bit row; each row names its ONNX `folder`."""
    rows = []
    for index, (name, recipe) in enumerate(ROWS.items()):
        print(f"== {name}", file=sys.stderr)
        run, onnx = scratch / f"{index}-run", scratch / f"{index}-onnx"
        made = quantize("digits", recipe, run, progress=progress)
        exported = export(run, onnx, progress=progress)
        result = evaluate(onnx, reference, provider=provider, progress=progress).to_json()
        kept = ("fd", "fd_ratio", "class_accuracy", "snr_db", "provider")
        parity = ("parity_db_min", "parity_db", "parity_db_pooled_min", "parity_ties")
        rows.append(
            {"name": name}
            | {key: result[key] for key in kept}
            | {key: made[key] for key in ("bytes_before", "bytes_after", "seconds")}
            | {"fine_tune_seconds": made.get("fine_tune_seconds")}
            | {key: exported[key] for key in parity}
            | {"folder": onnx}
        )
    return rows


def main() -> None:
    """Measure all rows and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/digits.json"))
    arguments = parser.parse_args()
    progress = ProgressPrinter()
    reference = draw_reference(
        "digits", images=arguments.images, steps=STEPS, seed=arguments.seed, progress=progress
    )
    rows: list[dict[str, Any]] = [
        {
            "name": "float",
            "fd": reference.scores.fd,
            "class_accuracy": reference.scores.accuracy,
            "provider": "torch",
        }
    ]
    with tempfile.TemporaryDirectory() as scratch:
        low_bit = measure_rows(reference, Path(scratch), arguments.provider, progress)
        folders = {row["name"]: row.pop("folder") for row in low_bit}
        rows += low_bit
        pair = {name: folders[name] for name in (PER_STEP, STATIC)}
        speed = {
            f"{provider}, batch {batch}": latencies(pair, provider, batch, arguments.rounds)
            for provider in ("cpu", "openvino")
            for batch in (1, 64)
        }
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "cpu_features": sorted(processor_features()),
        "images": arguments.images,
        "steps": STEPS,
        "seed": arguments.seed,
        "rows": rows,
        "latency_ms": speed,
        "packages": package_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    for row in rows:
        print(f"{row['name']:28s} FD {row['fd']:6.2f}  accuracy {row['class_accuracy']:.1%}")
    for name, values in speed.items():
        ratio = values[PER_STEP]["median"] / values[STATIC]["median"]
        print(f"{name:20s} per-step vs static scales: {ratio:.3f} x")


if __name__ == "__main__":
    main()
