"""A file of `trtq selftest` as a GPU would give it, with invented times."""

from __future__ import annotations

from trtq.bench.kernel_operands import SHAPES
from trtq.selftest.record import GpuRow, KernelRow, SelftestFile, TimeRow, TrialRow

__all__ = ["sample"]


def sample(**changes) -> SelftestFile:
    """A file with two rows of times: the layer took 20 us, and 60 us in half precision."""
    times = [
        TimeRow(
            model=shape.model,
            shape=shape.text,
            form="w4a8",
            tile="128x128",
            splits=1,
            wrong_values=0,
            both=20.0,
            quantise=5.0,
            product=16.0,
            half=60.0,
            tiles={"64x64": 25.0, "128x128": 16.0},
        )
        for shape in SHAPES[:2]
    ]
    gpu = GpuRow(
        name="NVIDIA GeForce RTX 4090",
        architecture="sm89",
        processors=128,
        memory_bytes=24 << 30,
        tested=True,
    )
    fields = {
        "trtq": "0.1.0",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "complete": True,
        "machine": {"driver": "580 (CUDA 13.0)"},
        "gpus": [gpu],
        "checks": [
            TrialRow(stage=2, name="tiles/w8a8", ok=True, seconds=0.5),
            TrialRow(stage=3, name="torch", ok=None, seconds=0.0, skipped="pip install torch"),
        ],
        "kernels": [
            KernelRow(
                variant="quantize-f16", registers=64, local_bytes=0, shared_bytes=0, blocks_per_sm=8
            )
        ],
        "rows": times,
    }
    return SelftestFile(**(fields | changes))
