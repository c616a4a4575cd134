"""Stage 0: the machine. It refuses machines on which no other stage could run."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from trtq.bench.device import cpu_name
from trtq.errors import KernelError, UsageError
from trtq.plugins import driver
from trtq.plugins.compile import nvrtc_version
from trtq.selftest.record import GpuRow
from trtq.selftest.trials import Options, Outcome, Trial

__all__ = ["commit", "gpu_row", "require", "trials"]

_PACKAGES = (
    *("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    *("onnxruntime-ep-nv-tensorrt-rtx", "tensorrt-rtx", "tensorrt", "cuda-bindings"),
    *("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-sanitizer-api", "nvidia-ml-py"),
)
_ATTRIBUTES = {
    "processors": "MULTIPROCESSOR_COUNT",
    "bus_bits": "GLOBAL_MEMORY_BUS_WIDTH",
    "cache_bytes": "L2_CACHE_SIZE",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def require(options: Options) -> None:
    """Raise unless the other stages can run: a driver, its version, and the GPU that was chosen.

    Raises:
        KernelError: there is no driver, it is too old, or there is no GPU.
        MissingDependencyError: cuda-bindings is not installed.
        UsageError: there is no GPU with this index.
    """
    if driver.driver_cuda() is None:
        raise KernelError("trtq selftest needs an NVIDIA GPU: there is no NVIDIA driver here")
    driver.check_driver()
    count = _count()
    if not count:
        raise KernelError("trtq selftest needs an NVIDIA GPU: this process may use none")
    if options.device >= count:
        raise UsageError(
            f"there is no GPU {options.device}; this process may use {count}, counted from 0"
        )
    nvrtc_version()


def trials(options: Options) -> Iterator[Trial]:
    """What is installed, and one trial per GPU."""
    yield Trial("machine", _machine)
    for index in range(_count()):
        yield Trial(f"GPU {index}", partial(_gpu, index, tested=index == options.device))


def _count() -> int:
    return int(driver.call("cuDeviceGetCount", what="no GPU can be used"))


def _machine() -> Outcome:
    cuda = driver.driver_cuda()
    detail = {
        "system": platform.system(),
        "wsl": "microsoft" in platform.release().lower(),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "driver": None if cuda is None else driver.cuda_text(cuda),
        "nvrtc": "{}.{}".format(*nvrtc_version()),
        "torch_cuda": _torch_cuda(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    return Outcome(sections={"machine": detail})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built with, without importing torch; None: for the CPU."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    version = re.search(r"^cuda\b[^=\n]*= '([0-9.]+)'", text, re.MULTILINE)
    return None if version is None else version[1]


def _gpu(index: int, *, tested: bool) -> Outcome:
    return Outcome(sections={"gpus": [gpu_row(index, tested=tested).model_dump()]})


def gpu_row(index: int, *, tested: bool = True) -> GpuRow:
    """A GPU as the driver reports it, after `require`.

    Args:
        index: CUDA's index of the GPU.
        tested: whether the stages run on this GPU.
    """
    what = f"cannot read the properties of GPU {index}"
    device = driver.call("cuDeviceGet", index, what=what)
    attribute = driver.bindings().CUdevice_attribute

    def ask(name: str) -> int:
        number = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(driver.call("cuDeviceGetAttribute", number, device, what=what))

    name = driver.call("cuDeviceGetName", 256, device, what=what)
    major, minor = ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")
    return GpuRow(
        name=name.partition(b"\0")[0].decode(errors="replace"),
        architecture=f"sm{major}{minor}",
        memory_bytes=int(driver.call("cuDeviceTotalMem", device, what=what)),
        clock_mhz=ask("CLOCK_RATE") / 1e3 or None,
        memory_mhz=ask("MEMORY_CLOCK_RATE") / 1e3 or None,
        tested=tested,
        **{key: ask(name) for key, name in _ATTRIBUTES.items()},
        **_counters(index),
    )


def _counters(index: int) -> dict[str, Any]:
    """Limit of power, and number of processes on the GPU; nothing without nvidia-ml-py."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None or pynvml.nvmlDeviceGetCount() > 1:
            return {}  # NVML counts GPUs in another order.
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        return {
            "watts_limit": pynvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3,
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(device)),
        }
    except Exception:  # No module, no library, or a GPU without such a counter.
        return {}


def commit() -> str | None:
    """The commit that trtq was installed from, or that is checked out; None for a release."""
    try:
        text = metadata.distribution("trtq").read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        text = ""
    recorded = re.search(r'"commit_id":\s*"([0-9a-f]{40})"', text)
    if recorded is not None:
        return recorded[1]
    root = Path(sys.modules["trtq"].__file__ or "").parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if _COMMIT.fullmatch(done.stdout.strip()) else None
