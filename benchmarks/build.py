"""TensorRT-RTX engines of a UNet of Stable Diffusion 1.5's size, built without a GPU.

    python benchmarks/sd_size.py --folder DIR          (makes DIR/checkpoint and the W4A8 run DIR/run)
    python benchmarks/build.py DIR

Exports the float checkpoint, and the run in both graph forms, in half precision. Builds each graph for
one GPU architecture and for three, without the engine cache, and records time, memory and size. The
weights are random, so quality is not measured; the engines do not run.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd_size import stage

from trtq.artefact.opened import open_folder
from trtq.bench.device import cpu_name
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.processor import processor_features

ROOT = Path(__file__).parent
ONE_GPU, THREE_GPUS = ("sm89",), ("sm86", "sm89", "sm120")
GRAPHS = {
    "float": ("checkpoint", "qdq"),
    "W4A8, pairs": ("run", "qdq"),
    "W4A8, plugins": ("run", "plugin"),
}


def exported(folder: Path, name: str) -> Path:
    """Folder of the half-precision graph of one row; exported if it does not exist."""
    source, target = GRAPHS[name]
    out = folder / f"half_{source}_{target}"
    if not out.is_dir():
        options = ["--precision", "fp16", "--target", target, "--batch", "1:4"]
        stage("export", str(folder / source), "-o", str(out), *options)
    return out


def measure(folder: Path, name: str, architectures: tuple[str, ...]) -> dict[str, Any]:
    """Build one graph and return the values of its denoiser."""
    onnx, engine = exported(folder, name), folder / "engine"
    chosen = [part for architecture in architectures for part in ("--arch", architecture)]
    result = stage("build", str(onnx), "-o", str(engine), *chosen, "--no-cache", "--overwrite")
    denoiser = open_folder(onnx).manifest.denoiser
    (row,) = [row for row in result["engines"] if row["name"] == denoiser]
    return {
        "graph": name,
        "architectures": list(architectures),
        "seconds": row["parse_seconds"] + row["build_seconds"],
        "peak_rss_bytes": row["peak_rss_bytes"],
        "engine_bytes": row["engine_bytes"],
        "layers": row["layers"],
        "pipeline_seconds": result["seconds"],
    }


def main() -> None:
    """Measure and write every row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "build.json")
    options = parser.parse_args()
    record = {
        "device": cpu_name(),
        "cpu_features": sorted(processor_features()),
        "date": datetime.now(UTC).date().isoformat(),
        "builder": f"tensorrt-rtx {BACKENDS['tensorrt-rtx'].version}",
        "rows": [],
    }
    for name in GRAPHS:
        for architectures in (ONE_GPU, THREE_GPUS):
            record["rows"].append(measure(options.folder, name, architectures))
            options.output.write_text(json.dumps(record, indent=2) + "\n")
            print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
