"""Devices: names, peak performance, and the memory, power and clocks of an NVIDIA GPU."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from trtq.plugins.driver import first_gpu_uuid

__all__ = ["GpuMemory", "GpuState", "Nvml", "Peak", "cpu_name", "cpu_peak", "gpu_peak"]

_MATRIX = 1024
_COPIED_BYTES = 1 << 27
_PEAK_TRIES = 15


@dataclass(frozen=True)
class Peak:
    """Peak performance of a device.

    Attributes:
        operations: peak number of operations per second; a multiply-add counts as two.
        bytes: memory bandwidth in bytes per second, reads plus writes.
        what: source of the two values.
    """

    operations: float
    bytes: float
    what: str


_TERA = 1e12
# By driver name: fp16 with fp32 accumulation, int8 (both dense, in TOP/s), memory bandwidth in TB/s.
# Computed as SMs x operations per clock and SM x boost clock; A100, H100 and H200: NVIDIA's figures.
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
    """Look up the published peak of a GPU; None for a GPU that is not in the table.

    Args:
        name: full name as reported by the driver. Prefixes do not match: products with similar names and
            MIG slices have other peaks.
        integers: whether to return the int8 peak instead of the fp16 peak.
    """
    known = name.removeprefix("NVIDIA ")
    if known not in _NVIDIA:
        return None
    half, int8, memory = _NVIDIA[known]
    what = f"published peak of {known}, {'int8' if integers else 'fp16'}, dense"
    return Peak((int8 if integers else half) * _TERA, memory * _TERA, what)


def cpu_peak(threads: int) -> Peak:
    """Measure the best float32 matrix product and the best memory copy in torch on this processor."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
    destination = torch.empty_like(source)
    product = _min_seconds(lambda: torch.mm(left, right))
    copied = _min_seconds(lambda: destination.copy_(source))
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
    """Name of the processor; its architecture if the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cuda_first(nvml: Any) -> Any:
    """NVML handle of CUDA's first device.

    Raises:
        Exception: NVML fails, there is no GPU, or CUDA's first device cannot be identified.
    """
    uuid = first_gpu_uuid()
    if uuid is not None:
        # Older versions of the module expect bytes.
        for form in (uuid, uuid.encode()):
            try:
                return nvml.nvmlDeviceGetHandleByUUID(form)
            except (nvml.NVMLError, TypeError):
                continue
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None or nvml.nvmlDeviceGetCount() != 1:
        raise LookupError("cannot identify CUDA's first device among NVML's GPUs")
    return nvml.nvmlDeviceGetHandleByIndex(0)


@dataclass(frozen=True)
class GpuMemory:
    """GPU memory in use at one moment, in bytes; None if the driver does not report it.

    Attributes:
        process: memory of this process; unknown before its first use of the GPU, and in containers
            whose process ids differ from the driver's.
        info: memory of all processes on the card.
    """

    process: int | None = None
    info: int | None = None

    def added_to(self, before: GpuMemory) -> int | None:
        """Memory added since an earlier moment, by this process if known, else by all processes."""
        if self.process is not None:
            return max(self.process - (before.process or 0), 0)
        if self.info is None or before.info is None:
            return None
        return max(self.info - before.info, 0)


class GpuState(TypedDict):
    """Values that limit the speed of a GPU at one moment; see `Nvml.state`."""

    sm_mhz: int | None
    memory_mhz: int | None
    watts: float | None
    watts_limit: float | None
    celsius: int | None
    slowed: int | None


class Nvml:
    """Driver counters of CUDA's first device.

    Every property is None without a GPU or without nvidia-ml-py. NVML numbers all GPUs by bus position;
    CUDA numbers the visible GPUs (`CUDA_VISIBLE_DEVICES`), fastest first. On machines with several GPUs
    the device is therefore identified by its UUID.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._device = _cuda_first(nvml)
        except Exception:  # No module, driver or device; the errors have no common base class.
            return
        self._nvml = nvml

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Query the driver; None if the card does not support the query."""
        if self._nvml is None:
            return None
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):  # Older modules support fewer queries.
            return None

    @property
    def state(self) -> GpuState:
        """Current clocks, power and temperature; None for each value that is not reported.

        `slowed` holds NVML's clock throttle reasons as bits; 0 means none and 1 means idle.
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
        """Name of the GPU; ends in `(MIG)` if the GPU is partitioned and the process has one slice."""
        reported = self._ask(lambda: self._nvml.nvmlDeviceGetName(self._device))
        name: str | None = reported.decode() if isinstance(reported, bytes) else reported
        divided = self._ask(lambda: self._nvml.nvmlDeviceGetMigMode(self._device))
        return f"{name} (MIG)" if name is not None and divided and divided[0] else name

    @property
    def driver(self) -> str | None:
        """Version of the driver."""
        version = self._ask(lambda: self._nvml.nvmlSystemGetDriverVersion())
        return version.decode() if isinstance(version, bytes) else version

    @property
    def joules(self) -> float | None:
        """Energy used since the driver was loaded, in joules."""
        millijoules = self._ask(
            lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        )
        return None if millijoules is None else millijoules / 1e3

    @property
    def memory(self) -> GpuMemory:
        """GPU memory currently in use."""
        rows = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device))
        mine = [row.usedGpuMemory for row in rows or () if row.pid == os.getpid()]
        whole = self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._device))
        return GpuMemory(
            int(mine[0]) if mine and mine[0] is not None else None,
            None if whole is None else int(whole.used),
        )
