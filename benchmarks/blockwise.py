"""Block-wise fine-tuning compared with fine-tuning of the whole denoiser: quality and memory.

    python benchmarks/blockwise.py [--models digits-dit digits] [--seeds 0 1] [--only NAME ...]

Every parameter gets the same number of updates in all rows of a model (`--iterations`, of `--batch`
images), so a block-wise row has more optimiser updates, each of one block. Quality is evaluated in
torch, from the same noise in every row. The memory is counted in a second, short fine-tuning: the peak
of the bytes of all tensors that fine-tuning creates, i.e. activations, gradients, optimiser state and
kept points, without the model and its adapters, which are the same in all rows. The count does not
depend on other programs; the durations do, see `load`. Rows that are already in the output are skipped,
so the script can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import trtq.runs.quantize
from trtq.artefact.manifest_file import package_versions
from trtq.bench.device import cpu_name
from trtq.evaluation.evaluate import evaluate
from trtq.evaluation.reference import ReferenceSet, draw_reference
from trtq.progress import ProgressPrinter
from trtq.runs.quantize import quantize

RESULTS = Path(__file__).parent / "results" / "blockwise.json"
STEPS = 20
BASE: dict[str, Any] = {"method": "efficientdm", "bits": "w4a4"}
ROWS: dict[str, dict[str, Any]] = {
    "search, not fine-tuned": {"method": "search", "bits": "w4a4"},
    "whole model": BASE,
    "whole model, recomputed": BASE | {"training": {"gradient_checkpointing": True}},
    "block by block": BASE | {"blockwise": {}},
    "block by block, float inputs": BASE | {"blockwise": {"inputs": "float"}},
    "block by block, then 50 of the whole model": BASE | {"blockwise": {"whole_iterations": 50}},
}
MEMORY_ONLY = ("whole model, recomputed",)
"""Rows whose result is that of another row."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside the block and live at the same time.

    Attributes:
        peak: largest number of bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation and count the memory of its results."""
        before = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in before and key not in self._live:
                self._live.add(key)
                self._total += storage.nbytes()
                weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak = max(self.peak, self._total)
        return result

    def _release(self, key: int, nbytes: int) -> None:
        self._live.discard(key)
        self._total -= nbytes


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in _pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf


@contextmanager
def counted() -> Iterator[LiveBytes]:
    """Inside the block, `quantize` counts the memory of its fine-tuning."""
    live = LiveBytes()
    tune: Callable[..., Any] = trtq.runs.quantize.fine_tune

    def counting(*given: Any) -> Any:
        with live:
            return tune(*given)

    with mock.patch.object(trtq.runs.quantize, "fine_tune", counting):
        yield live


def settings(name: str, seed: int, training: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a row."""
    row = ROWS[name]
    if row["method"] == "search":
        return row | {"seed": seed}
    return row | {"seed": seed, "training": training | row.get("training", {})}


def memory(model: str, name: str, batch: int) -> int | None:
    """Peak of the bytes that a short fine-tuning adds; None without a fine-tuning."""
    training = {"iterations": 3, "batch": batch, "lora_travel": 0.1}
    recipe = settings(name, 0, training)
    if recipe["method"] == "search":
        return None
    if "blockwise" in recipe:
        whole = min(1, recipe["blockwise"].get("whole_iterations", 0))
        recipe["blockwise"] = recipe["blockwise"] | {"whole_iterations": whole}
    recipe |= {"calibration": {"images": 8, "samples_per_step": 256}}
    with tempfile.TemporaryDirectory() as scratch, counted() as live:
        quantize(model, recipe, Path(scratch) / "run")
    return live.peak


def measured(
    reference: ReferenceSet, model: str, name: str, seed: int, training: dict[str, Any]
) -> dict[str, Any]:
    """Quality and duration of a row."""
    row: dict[str, Any] = {"model": model, "name": name, "seed": seed}
    if name not in MEMORY_ONLY:
        progress = ProgressPrinter()
        with tempfile.TemporaryDirectory() as scratch:
            run = Path(scratch) / "run"
            made = quantize(model, settings(name, seed, training), run, progress=progress)
            assert made is not None
            result = evaluate(run, reference, progress=progress).to_json()
        row |= {
            key: result[key] for key in ("fd", "fd_ratio", "class_accuracy", "psnr_db", "snr_db")
        }
        row |= {
            "fine_tune_seconds": made.fine_tune_seconds,
            "updates": made.fine_tune_iterations,
            "bytes_before": made.bytes_before,
        }
    return row | {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[2], 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure the missing rows and write the output after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["digits-dit", "digits"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, Any] = {"rows": []}
    if options.output.is_file():
        record = json.loads(options.output.read_text(encoding="utf-8"))
    training = {"iterations": options.iterations, "batch": options.batch}
    record |= {"images": options.images, "steps": STEPS, "training": training}
    record |= {"packages": package_versions()}
    known = {(row["model"], row["name"], row["seed"]) for row in record["rows"]}
    for model in options.models:
        reference = draw_reference(model, images=options.images, steps=STEPS, seed=1)
        for seed in options.seeds:
            for name in options.only:
                first = seed == options.seeds[0]
                if (model, name, seed) in known or (name in MEMORY_ONLY and not first):
                    continue
                print(f"== {model}, {name}, seed {seed}", file=sys.stderr)
                row = measured(reference, model, name, seed, training)
                # The seed has no effect on the memory.
                counts = [
                    other["added_bytes"]
                    for other in record["rows"]
                    if (other["model"], other["name"]) == (model, name)
                ]
                row["added_bytes"] = counts[0] if counts else memory(model, name, options.batch)
                record["rows"].append(row)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                print({key: row.get(key) for key in ("name", "fd", "psnr_db", "added_bytes")})


if __name__ == "__main__":
    main()
