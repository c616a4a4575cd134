"""Write modelopt_calibrators.json: `python -m tests.golden.modelopt_calibrators`.

Needs nvidia-modelopt 0.47, omegaconf and scipy, which trtq does not use. numpy draws the tensors from
fixed seeds, see `tensors`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "modelopt_calibrators.json"
BITS, PERCENTILES = 8, (99.0, 99.9, 99.99)


def tensors() -> dict[str, list[np.ndarray]]:
    """Twenty tensors as batches, of the kinds that layers of denoisers see."""
    made = {}
    for seed in range(4):
        random = np.random.RandomState(seed)
        batches = [random.standard_normal(6000) * scale for scale in (1.0, 1.0 + seed / 4)]
        kinds = {
            "normal": lambda x: x,
            "relu": lambda x: np.maximum(x, 0),
            "silu": lambda x: 2 * x / (1 + np.exp(-2 * x)),
            "heavy": lambda x: x**3,
            "uniform": lambda x: np.sin(5 * x),
        }
        for name, function in kinds.items():
            made[f"{name} {seed}"] = [function(batch).astype(np.float32) for batch in batches]
    return made


def main() -> None:
    """Compute and write every amax."""
    import torch

    modelopt: Any = importlib.import_module("modelopt")
    histogram: Any = importlib.import_module("modelopt.torch.quantization.calib.histogram")
    amax: dict[str, dict[str, float]] = {}
    for name, batches in tensors().items():
        calibrator = histogram.HistogramCalibrator(BITS, None, False)
        for batch in batches:
            calibrator.collect(torch.from_numpy(batch))
        row = {"entropy": float(calibrator.compute_amax("entropy"))}
        for percentile in PERCENTILES:
            value = calibrator.compute_amax("percentile", percentile=percentile)
            row[f"percentile:{percentile:g}"] = float(value)
        amax[name] = row
    record = {"modelopt": modelopt.__version__, "bits": BITS, "amax": amax}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
