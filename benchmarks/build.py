"""TensorRT-RTX engines of a UNet of Stable Diffusion 1.5's size, built without a GPU.

    python benchmarks/sd_size.py --folder DIR          (makes DIR/checkpoint and the W4A8 run DIR/run)
    python benchmarks/build.py DIR

Exports the float checkpoint and the run in half precision, the run in both forms, and builds each for
one card and for three: time, memory, size. Nothing comes from the engine cache. Weights are random: no
quality is measured. No engine is run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trtq.artefact.manifest_file import read_manifest
from trtq.bench.device import cpu_name
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.processor import processor_features

ROOT = Path(__file__).parent
ONE, SEVERAL = ("sm89",), ("sm86", "sm89", "sm120")
GRAPHS = {
    "float": ("checkpoint", "qdq"),
    "W4A8, pairs": ("run", "qdq"),
    "W4A8, plugins": ("run", "plugin"),
}


def trtq(*arguments: str) -> dict[str, Any]:
    """One command in a process of its own."""
    command = [sys.executable, "-m", "trtq.cli", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def exported(folder: Path, name: str) -> Path:
    """The half-precision graph of one row; made unless it is there."""
    source, target = GRAPHS[name]
    out = folder / f"half_{source}_{target}"
    if not out.is_dir():
        options = ["--precision", "fp16", "--target", target, "--batch", "1:4"]
        trtq("export", str(folder / source), "-o", str(out), *options)
    return out


def measure(folder: Path, name: str, architectures: tuple[str, ...]) -> dict[str, Any]:
    """Build one graph, and keep what concerns its denoiser."""
    onnx, engine = exported(folder, name), folder / "engine"
    chosen = [part for architecture in architectures for part in ("--arch", architecture)]
    found = trtq("build", str(onnx), "-o", str(engine), *chosen, "--no-cache", "--overwrite")
    denoiser = read_manifest(onnx).denoiser
    (row,) = [row for row in found["engines"] if row["name"] == denoiser]
    return {
        "graph": name,
        "architectures": list(architectures),
        "seconds": row["parse_seconds"] + row["build_seconds"],
        "peak_rss_bytes": row["peak_rss_bytes"],
        "engine_bytes": row["engine_bytes"],
        "layers": row["layers"],
        "pipeline_seconds": found["seconds"],
    }


def main() -> None:
    """Measure every row and write them."""
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
        for architectures in (ONE, SEVERAL):
            record["rows"].append(measure(options.folder, name, architectures))
            options.output.write_text(json.dumps(record, indent=2) + "\n")
            print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
