"""What the numbers were measured on, and what it could do at best."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.plugins.driver import first_gpu_uuid

__all__ = ["GpuMemory", "Nvml", "Peak", "cpu_name", "cpu_peak", "gpu_peak"]

_MATRIX = 1024
_COPIED_BYTES = 1 << 27
_PEAK_TRIES = 15


@dataclass(frozen=True)
class Peak:
    """The most that a device does.

    Attributes:
        operations: per second; one multiplication and one addition are two.
        bytes: of its memory, read or written per second.
        what: where the numbers come from.
    """

    operations: float
    bytes: float
    what: str


_TERA = 1e12
# By the driver's name of the card: fp16 with fp32 accumulators, int8 (dense, both in TOP/s), memory in
# TB/s. SMs x operations per clock and SM x boost clock; those of the A100, H100 and H200 are NVIDIA's.
_NVIDIA = {
    "GeForce RTX 3090": (71, 285, 0.936),
    "GeForce RTX 4090": (165, 661, 1.008),
    "GeForce RTX 5090": (210, 838, 1.792),
    "A100-SXM4-40GB": (312, 624, 1.555),
    "A100-PCIE-40GB": (312, 624, 1.555),
    "A100-SXM4-80GB": (312, 624, 2.039),
    "A100 80GB PCIe": (312, 624, 1.935),
    "H100 80GB HBM3": (989, 1979, 3.35),
    "H200": (989, 1979, 4.8),
}


def gpu_peak(name: str, *, integers: bool) -> Peak | None:
    """The published peak of a GPU, for int8 or for fp16; None of one that is not in our table.

    Args:
        name: the driver's. Only a whole one is known: what is sold under a name that begins alike has
            other numbers, and so has a slice of a card.
        integers: the peak of int8.
    """
    known = name.removeprefix("NVIDIA ")
    if known not in _NVIDIA:
        return None
    half, int8, memory = _NVIDIA[known]
    what = f"published peak of {known}, {'int8' if integers else 'fp16'}, dense"
    return Peak((int8 if integers else half) * _TERA, memory * _TERA, what)


def cpu_peak(threads: int) -> Peak:
    """What torch reaches here in a product of float32 matrices and in copying memory, at best."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _min_seconds(lambda: torch.mm(left, right))
    copied = _min_seconds(lambda: target.copy_(source))
    return Peak(
        2 * _MATRIX**3 / product,
        2 * _COPIED_BYTES / copied,
        f"float32 product of {_MATRIX} x {_MATRIX} matrices in torch, measured in this run",
    )


def _min_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_PEAK_TRIES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cuda_first(nvml: Any) -> Any:
    """NVML's handle of the GPU that CUDA calls its first.

    Raises:
        Exception: of the module; there is none, or it cannot be told which one it is.
    """
    uuid = first_gpu_uuid()
    if uuid is not None:
        # Older versions of the module take bytes.
        for form in (uuid, uuid.encode()):
            try:
                return nvml.nvmlDeviceGetHandleByUUID(form)
            except (nvml.NVMLError, TypeError):
                continue
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None or nvml.nvmlDeviceGetCount() != 1:
        raise LookupError("cannot tell which of NVML's GPUs is CUDA's first")
    return nvml.nvmlDeviceGetHandleByIndex(0)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes in use on a GPU at a moment; None where the driver does not tell.

    Attributes:
        process: of this process, which is unknown until it has used the GPU, and where process ids are
            not the driver's, as in a container.
        info: of everything on the card.
    """

    process: int | None = None
    info: int | None = None

    def added_to(self, before: GpuMemory) -> int | None:
        """Bytes that came between an earlier moment and this one: by this process, else on the card."""
        if self.process is not None:
            return max(self.process - (before.process or 0), 0)
        if self.info is None or before.info is None:
            return None
        return max(self.info - before.info, 0)


class Nvml:
    """The GPU that CUDA calls its first, as the driver counts what it does.

    Without one, or without nvidia-ml-py, it says None. NVML numbers GPUs by their place on the bus,
    whatever `CUDA_VISIBLE_DEVICES` says, and CUDA those it may see, the fastest first: where they are
    several, only the GPU's own identifier tells which one is meant.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._device = _cuda_first(nvml)
        except Exception:  # No module, no driver, no device: the module's errors share no base.
            return
        self._nvml = nvml

    def _ask(self, question: Callable[[], Any]) -> Any:
        """An answer of the driver, or None: not every card counts everything."""
        if self._nvml is None:
            return None
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):  # An older module asks less.
            return None

    @property
    def state(self) -> dict[str, Any]:
        """What bounds its speed at this moment; None of what it does not tell.

        `sm_mhz` and `memory_mhz` (clocks now), `watts`, `watts_limit`, `celsius`, and `slowed` (NVML's
        bits of why the clock is held down; 0 and 1 are none and idle).
        """
        n, device = self._nvml, getattr(self, "_device", None)
        return {
            "sm_mhz": self._ask(lambda: n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_SM)),
            "memory_mhz": self._ask(lambda: n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_MEM)),
            "watts": self._ask(lambda: n.nvmlDeviceGetPowerUsage(device) / 1e3),
            "watts_limit": self._ask(lambda: n.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3),
            "celsius": self._ask(
                lambda: n.nvmlDeviceGetTemperature(device, n.NVML_TEMPERATURE_GPU)
            ),
            "slowed": self._ask(lambda: n.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
        }

    @property
    def name(self) -> str | None:
        """Of the GPU; ends in `(MIG)` where it is divided and a process has only a slice of it."""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetName(self._device))
        name: str | None = found.decode() if isinstance(found, bytes) else found
        divided = self._ask(lambda: self._nvml.nvmlDeviceGetMigMode(self._device))
        return f"{name} (MIG)" if name is not None and divided and divided[0] else name

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        found = self._ask(lambda: self._nvml.nvmlSystemGetDriverVersion())
        return found.decode() if isinstance(found, bytes) else found

    @property
    def joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        found = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))
        return None if found is None else found / 1e3

    @property
    def memory(self) -> GpuMemory:
        """What is in use now."""
        rows = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device))
        mine = [row.usedGpuMemory for row in rows or () if row.pid == os.getpid()]
        whole = self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._device))
        return GpuMemory(
            int(mine[0]) if mine and mine[0] is not None else None,
            None if whole is None else int(whole.used),
        )
