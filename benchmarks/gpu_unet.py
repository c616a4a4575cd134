"""A UNet of Stable Diffusion 1.5's size on an NVIDIA GPU: low-bit kernels vs compiled half precision.

    python benchmarks/sd_size.py --folder DIR         (makes DIR/checkpoint and the W4A8 run DIR/run)
    python benchmarks/gpu_unet.py DIR/checkpoint DIR/run [OTHER_RUN ...]

One call of the denoiser, batch 2 (both halves of the guidance of one image). The baseline is diffusers'
UNet in half precision, channels last, with `torch.compile(mode="max-autotune")`; both sides use CUDA
graphs. Rows are timed in interleaved rounds in one process. The weights are random; every row also
records the SNR relative to torch on the CPU, which reveals wrong results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.manifest_file import package_versions
from trtq.artefact.opened import open_artefact
from trtq.diffusion.loading import open_pipeline
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.runs.folder import open_run
from trtq.snr import snr_db

ROOT = Path(__file__).parent
BATCH, ROUNDS, CALLS, WARM_UP = 2, 15, 10, 5
TIMESTEP = 500


def inputs(source: Any) -> dict[str, Tensor]:
    """Noise and conditions, equal for all rows."""
    generator = torch.Generator().manual_seed(0)
    conditions = source.draw_conditions(BATCH, generator)
    sample = torch.randn(BATCH, *source.sample_shape, generator=generator)
    return {"sample": sample, "timestep": torch.full((BATCH,), TIMESTEP), **conditions.conditional}


def compiled(checkpoint: Path, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Diffusers' UNet in half precision, compiled."""
    model = open_pipeline(str(checkpoint)).denoiser.cuda().half()
    model = torch.compile(model.to(memory_format=torch.channels_last), mode="max-autotune")
    moved = {
        name: value.cuda().half() if value.is_floating_point() else value.cuda()
        for name, value in given.items()
    }

    def call() -> Tensor:
        with torch.no_grad():
            predicted: Tensor = model(**moved, return_dict=False)[0]
        return predicted

    return call


def low_bit(run: Path, given: dict[str, Tensor]) -> tuple[GpuDenoiser, Callable[[], Tensor]]:
    """A call of a run on the low-bit kernels; all inputs are on the GPU except the timesteps."""
    denoiser = GpuDenoiser(open_run(run).denoiser(kernels=True))
    moved = {name: value if name == "timestep" else value.cuda() for name, value in given.items()}
    return denoiser, lambda: denoiser(**moved, return_dict=False)[0]


def weight_bytes(denoiser: GpuDenoiser) -> int:
    """Bytes of all parameters and buffers that the denoiser keeps on the GPU."""
    tensors = [*denoiser.model.parameters(), *denoiser.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def milliseconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Milliseconds per call in each round, by name; the rounds are interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return times


def main() -> None:
    """Measure every run and the compiled checkpoint, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "gpu_unet.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU here; nothing was measured")
    source = open_pipeline(str(options.checkpoint))
    given = inputs(source)
    half_bytes = 2 * sum(p.numel() for p in source.denoiser.parameters())
    calls = {"float": compiled(options.checkpoint, given)}
    rows: dict[str, dict[str, Any]] = {"float": {"weight_bytes": half_bytes}}
    for run in options.runs:
        denoiser, calls[str(run)] = low_bit(run, given)
        with torch.no_grad():
            reference = open_run(run).denoiser()(**given, return_dict=False)[0]
        rows[str(run)] = {
            "bits": open_artefact(run, verify=False).bits,
            "weight_bytes": weight_bytes(denoiser),
            "snr_db": snr_db(reference, calls[str(run)]().float().cpu()),
        }
    times = milliseconds(calls)
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(times["float"], times[name], strict=True)]
        row["milliseconds"] = statistics.median(times[name])
        row["speedup"] = statistics.median(ratios)
        row["quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    record = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "packages": package_versions(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
