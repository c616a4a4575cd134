"""The CUDA driver: its version, its calls, and explanations of its errors."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins.compile import nvrtc_version

__all__ = [
    "bindings",
    "call",
    "check_driver",
    "cuda_text",
    "driver_cuda",
    "first_gpu_text",
    "first_gpu_uuid",
    "old_driver",
]

_DRIVERS = {
    (13, 0): 580,
    (12, 9): 575,
    (12, 8): 570,
    (12, 7): 565,
    (12, 6): 560,
    (12, 5): 555,
    (12, 4): 550,
    (12, 3): 545,
    (12, 2): 535,
    (12, 1): 530,
    (12, 0): 525,
}
"""NVIDIA's first driver for each CUDA version, from the release notes of CUDA."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""`CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR` of CUDA's driver API."""


def bindings() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise MissingDependencyError(
            "our kernels are started through cuda-bindings, which is not installed: "
            "pip install 'trtq[plugins]'"
        ) from err
    return driver


@cache
def _library() -> Any:
    """The driver's library, without cuda-bindings; None if it is missing or cannot be loaded."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None if there is no driver.

    The function needs neither cuda-bindings nor a GPU.
    """
    library, version = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def first_gpu_uuid() -> str | None:
    """UUID of the first GPU visible to this process, in NVML's notation; None if there is no GPU.

    With `CUDA_VISIBLE_DEVICES`, or if CUDA lists the fastest GPU first, this may not be NVML's first
    GPU.
    """
    library, device, uuid = _library(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if library is None or library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if library.cuDeviceGetUuid(uuid, device):
        return None
    digits = bytes(uuid).hex()
    return "GPU-" + "-".join(
        digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    )


def first_gpu_text() -> str | None:
    """Name, architecture and driver of the first GPU visible to this process; None if there is no GPU.

    Engines that were compiled for one such text may not run with another one.
    """
    library, device = _library(), ctypes.c_int()
    if library is None or library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, values = ctypes.create_string_buffer(256), []
    if library.cuDeviceGetName(name, len(name), device):
        return None
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        values.append(value.value)
    return f"{name.value.decode(errors='replace')}, sm{values[0]}{values[1]}, CUDA {driver_cuda()}"


def cuda_text(version: tuple[int, int]) -> str:
    """A driver as text, e.g. `550 (CUDA 12.4)`.

    Args:
        version: newest CUDA version that the driver supports.
    """
    known = _DRIVERS.get(version)
    cuda = f"CUDA {version[0]}.{version[1]}"
    return cuda if known is None else f"{known} ({cuda})"


def old_driver() -> str | None:
    """Message about a driver that is older than the installed CUDA packages, with the remedy.

    Returns:
        The message; None if the driver is new enough, or if there is no driver or no package.
    """
    supported, needed = driver_cuda(), _needed_cuda()
    if supported is None or needed is None or supported[0] >= needed:
        return None
    first = _DRIVERS.get((needed, 0))
    wanted = f"a driver for CUDA {needed}" if first is None else f"driver {first} or later"
    other = (
        ", or `pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12` and `pip uninstall "
        "nvidia-cuda-nvrtc`"
        if supported[0] == 12
        else ""
    )
    installed = cuda_text(supported)
    return f"{wanted} is needed for CUDA {needed}, you have {installed}; update the driver{other}"


def _needed_cuda() -> int | None:
    """The major CUDA version of cuda-bindings and NVRTC; None if they are not installed.

    A driver rejects cubins of a later major version; minor versions do not matter.
    """
    try:
        import cuda.bindings
    except ImportError:
        return None
    majors = [int(str(cuda.bindings.__version__).partition(".")[0])]
    with suppress(MissingDependencyError):
        # The versions may differ: cuda-bindings 12.9 prefers NVRTC 13, and cuda-bindings 13 accepts
        # NVRTC 12.
        majors.append(nvrtc_version()[0])
    return max(majors)


@cache
def check_driver() -> None:
    """Raise unless there is a suitable driver; initialise it at the first call.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or it is too old.
    """
    bindings()
    if driver_cuda() is None:
        raise KernelError("no GPU can be used: there is no NVIDIA driver on this machine")
    old = old_driver()
    if old is not None:
        raise KernelError(f"no GPU can be used: {old}")
    call("cuInit", 0, what="no GPU can be used")


def call(function: str, *arguments: Any, what: str) -> Any:
    """Call the driver.

    Args:
        function: name of the driver's function.
        arguments: arguments of the function.
        what: consequence of a failure, used in the message.

    Returns:
        The results of the function, without the status.

    Raises:
        KernelError: there is no driver, or the call fails.
    """
    driver = bindings()
    try:
        status, *results = getattr(driver, function)(*arguments)
    except RuntimeError as err:  # The library cannot be loaded, or lacks the function.
        if driver_cuda() is None:
            raise KernelError(f"{what}: there is no NVIDIA driver on this machine") from err
        raise KernelError(f"{what}: the driver is too old, update it ({err})") from err
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"{what}: {_advice(status.name)}")
    return results[0] if len(results) == 1 else results


_ADVICE = {
    "NO_BINARY_FOR_GPU": "the kernel is for another GPU, or the driver is too old for it; update it",
    "INVALID_IMAGE": "the driver is too old for kernels of this NVRTC; update it",
    "INVALID_SOURCE": "the driver is too old for kernels of this NVRTC; update it",
    "UNSUPPORTED_PTX_VERSION": "the driver is too old for kernels of this NVRTC; update it",
    "OUT_OF_MEMORY": "the GPU's memory is full; use a smaller batch, or end other processes on the GPU "
    "(nvidia-smi lists them)",
    "STUB_LIBRARY": "the library path has CUDA's stub for linking in place of the driver's "
    "library; remove the folder `stubs` from LD_LIBRARY_PATH",
    "DEVICE_UNAVAILABLE": "another process uses the GPU exclusively (nvidia-smi lists it)",
    "SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module have different versions, for "
    "example after an update; restart the machine",
    "SYSTEM_NOT_READY": "the machine's GPU services are not running; start nvidia-fabricmanager",
    "COMPAT_NOT_SUPPORTED_ON_DEVICE": "the CUDA compatibility package does not support this GPU; remove "
    "it from LD_LIBRARY_PATH, and update the driver",
    "ERROR_UNKNOWN": "the driver does not respond, for example after the machine was suspended, or in "
    "a container without GPU devices; restart the machine, or run the container with --gpus all",
    "ILLEGAL_ADDRESS": "a kernel accessed memory out of bounds, which is a bug in trtq; this process "
    "can no longer use the GPU",
    "LAUNCH_TIMEOUT": "the display watchdog stopped a kernel; use a smaller batch",
    "INVALID_CONTEXT": "this thread has no CUDA context",
}


def _advice(status: str) -> str:
    if status.endswith("NO_DEVICE"):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{status}: there is no NVIDIA GPU that this process may use" + (
            "" if seen is None else f"; CUDA_VISIBLE_DEVICES is {seen!r}"
        )
    texts = [text for name, text in _ADVICE.items() if status.endswith(name)]
    return f"{status}: {texts[0]}" if texts else status
