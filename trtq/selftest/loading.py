"""Stage 1: every variant of the kernels is compiled and loaded, and the driver says what it takes.

`kernels.json` holds what ptxas says of each variant. `benchmarks/kernels_sass.py` writes it with its own
record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources

from trtq.plugins.compile import nvrtc_version
from trtq.plugins.device import CudaDevice, Gpu, KernelResources, current_device
from trtq.plugins.variants import Variant, all_variants
from trtq.selftest.record import KernelRow
from trtq.selftest.trials import Options, Outcome, Trial

__all__ = ["Listed", "listed", "trials"]


@dataclass(frozen=True)
class Listed:
    """What ptxas says of a variant.

    Attributes:
        registers: registers of a thread.
        local_bytes: spilled registers and stack of a thread.
        shared_bytes: static and dynamic shared memory of a block.
        blocks: blocks that a processor holds, by registers, shared memory and threads.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    blocks: int


@cache
def listed() -> tuple[str, dict[str, dict[str, Listed]]]:
    """The version of NVRTC, and the table by architecture and variant."""
    text = resources.files("trtq.selftest").joinpath("kernels.json").read_text(encoding="utf-8")
    table = json.loads(text)
    rows = {
        architecture: {name: Listed(*values) for name, values in variants.items()}
        for architecture, variants in table["architectures"].items()
    }
    return table["nvrtc"], rows


@cache
def _device() -> CudaDevice:
    Gpu()
    return current_device()


def trials(options: Options) -> Iterator[Trial]:
    """One trial per variant."""
    for variant in all_variants(_device().architecture):
        yield Trial(str(variant), partial(_load, variant))


def _load(variant: Variant) -> Outcome:
    device = _device()
    taken = device.resources(variant)
    row = KernelRow(
        variant=str(variant),
        registers=taken.registers,
        local_bytes=taken.local_bytes,
        shared_bytes=taken.static_bytes + variant.shared_bytes,
        blocks_per_sm=taken.blocks,
    )
    version, table = listed()
    wanted = table.get(device.architecture, {}).get(str(variant))
    detail, fault = {}, None
    if wanted is not None:
        differences = _differences(taken, row, wanted)
        detail = {"differs": differences} if differences else {}
        # The same compiler makes the same kernel; what shared memory the system adds may differ.
        same = version == "{}.{}".format(*nvrtc_version())
        known = [text for text in differences if text.startswith(("registers", "local"))]
        if same and known:
            fault = f"not the kernel of the table for NVRTC {version}: {'; '.join(known)}"
    if taken.blocks < 1:
        fault = "a processor of this GPU cannot hold one block"
    return Outcome(detail, fault, {"kernels": [row.model_dump()]})


def _differences(taken: KernelResources, row: KernelRow, wanted: Listed) -> list[str]:
    pairs = {
        "registers": (taken.registers, wanted.registers),
        "local bytes": (taken.local_bytes, wanted.local_bytes),
        "shared bytes": (row.shared_bytes, wanted.shared_bytes),
        "blocks per processor": (taken.blocks, wanted.blocks),
    }
    return [
        f"{name} {actual}, the table has {expected}"
        for name, (actual, expected) in pairs.items()
        if actual != expected
    ]
