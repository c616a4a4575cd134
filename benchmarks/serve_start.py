"""Start of `trtq serve`, with and without VNNI, and the modules that it imports.

    python benchmarks/serve_start.py [--digits ONNX] [--rounds 10]

The digits model, quantised at W4A8 and exported first unless its folder is given. Every start is a new
process with one thread per operator; it ends with the first `/readyz` with status 200. Both settings of
`TRTQ_CPU` are measured in interleaved rounds, after one start each that fills the cache of prepared
graphs. That start, with an empty cache, is recorded, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve import exported, processor, start_seconds

from trtq.artefact.manifest_file import package_versions

SETTINGS = ("+vnni", "-vnni")
HEAVY = ("torch", "onnx", "onnx_ir", "diffusers", "transformers")


def start(onnx: Path, provider: str, setting: str, cache: Path) -> float:
    """Time of one start in seconds, with a setting of `TRTQ_CPU` and a cache folder."""
    os.environ |= {"TRTQ_CPU": setting, "TRTQ_CACHE": str(cache)}
    (seconds,) = start_seconds(onnx, provider, 1)
    return seconds


def imported(onnx: Path, provider: str, setting: str, cache: Path) -> list[str]:
    """The heavy modules that are imported by opening the model to serve."""
    code = (
        "import sys; from trtq.serve.hosting import open_model;"
        f"open_model({str(onnx)!r}, 'x', provider={provider!r}, threads=1);"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    environment = os.environ | {"TRTQ_CPU": setting, "TRTQ_CACHE": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    return result.stdout.split()


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    default = Path("benchmarks/results/serve_start.json")
    parser.add_argument("-o", "--output", type=Path, default=default)
    options = parser.parse_args()
    before, device = os.getloadavg()[0], f"{processor()}, {os.cpu_count()} threads"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        onnx = options.digits or exported("digits", scratch)
        for provider in ("cpu", "openvino"):
            caches = {setting: scratch / f"{provider}{setting}" for setting in SETTINGS}
            cold = {
                setting: start(onnx, provider, setting, caches[setting]) for setting in SETTINGS
            }
            warm: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            for _ in range(options.rounds):
                for setting in SETTINGS:
                    warm[setting].append(start(onnx, provider, setting, caches[setting]))
            for setting in SETTINGS:
                row = {
                    "provider": provider,
                    "TRTQ_CPU": setting,
                    "cold_seconds": round(cold[setting], 3),
                    "seconds": [round(value, 3) for value in warm[setting]],
                    "median": round(statistics.median(warm[setting]), 3),
                    "heavy_modules": imported(onnx, provider, setting, caches[setting]),
                }
                rows.append(row)
                print(row)
    record = {
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "packages": package_versions(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
