"""The GPU that is there, through CUDA's driver: loads our cubins and starts them."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins.compile import cubin, nvrtc_version
from trtq.plugins.launch import Launch
from trtq.plugins.spec import Variant

__all__ = [
    "CudaDevice",
    "Gpu",
    "cuda_text",
    "current_device",
    "driver_cuda",
    "first_gpu",
    "first_gpu_uuid",
    "old_driver",
]

_USUAL_SHARED_BYTES = 48 << 10
"""A kernel must be told before it may have more."""
_NON_BLOCKING = 1
"""Of a stream: it does not wait for the legacy default stream, nor does that wait for it."""
_OLDEST = (7, 5)
"""Compute capability from which on tensor cores multiply integers."""
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
"""NVIDIA's first driver of each CUDA version, from the release notes of CUDA."""


def _driver() -> Any:
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
    """The driver's own library, without cuda-bindings; None: it is not there, or cannot be loaded."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver takes; None: there is no driver.

    It needs neither cuda-bindings nor a GPU.
    """
    library, version = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def first_gpu_uuid() -> str | None:
    """The first GPU that CUDA lets this process see, as NVML writes it; None: there is none.

    With `CUDA_VISIBLE_DEVICES`, or where CUDA counts the fastest first, it is not NVML's number 0.
    """
    library, device, found = _library(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if library is None or library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if library.cuDeviceGetUuid(found, device):
        return None
    digits = bytes(found).hex()
    return "GPU-" + "-".join(
        digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    )


def cuda_text(version: tuple[int, int]) -> str:
    """E.g. `550 (CUDA 12.4)`: a driver by the CUDA version that it takes."""
    known = _DRIVERS.get(version)
    cuda = f"CUDA {version[0]}.{version[1]}"
    return cuda if known is None else f"{known} ({cuda})"


def old_driver() -> str | None:
    """What is wrong with a driver that is older than the installed CUDA packages, and what to do.

    None: nothing is, or there is no driver or no package.
    """
    found, needed = driver_cuda(), _needed_cuda()
    if found is None or needed is None or found[0] >= needed:
        return None
    first = _DRIVERS.get((needed, 0))
    wanted = f"a driver for CUDA {needed}" if first is None else f"driver {first} or later"
    other = (
        ", or `pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12` and `pip uninstall "
        "nvidia-cuda-nvrtc`"
        if found[0] == 12
        else ""
    )
    return f"{wanted} is needed for CUDA {needed}, you have {cuda_text(found)}; update the driver{other}"


def _needed_cuda() -> int | None:
    """The major version of CUDA that cuda-bindings and NVRTC are of; None: they are not installed.

    Cubins of a later one than the driver's are refused, while minor versions do not matter.
    """
    try:
        import cuda.bindings
    except ImportError:
        return None
    majors = [int(str(cuda.bindings.__version__).partition(".")[0])]
    with suppress(MissingDependencyError):
        # Not always that of cuda-bindings: 12.9 prefers an NVRTC of 13, and 13 takes one of 12.
        majors.append(nvrtc_version()[0])
    return max(majors)


@cache
def _check_driver() -> None:
    """Nothing, if there is a driver for what is installed; asked before the first other call.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or it is too old.
    """
    _driver()
    if driver_cuda() is None:
        raise KernelError("no GPU can be used: there is no NVIDIA driver on this machine")
    old = old_driver()
    if old is not None:
        raise KernelError(f"no GPU can be used: {old}")
    _call("cuInit", 0, what="no GPU can be used")


def _call(function: str, *arguments: Any, what: str) -> Any:
    """Call the driver; gives its results without the status.

    Raises:
        KernelError: the driver is not there, or says no.
    """
    driver = _driver()
    try:
        status, *results = getattr(driver, function)(*arguments)
    except RuntimeError as err:  # The library cannot be loaded, or has no such function.
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
    "OUT_OF_MEMORY": "the GPU's memory is full; take a smaller batch, or end what else is on it "
    "(nvidia-smi lists it)",
    "STUB_LIBRARY": "the library path has CUDA's stub for linking in place of the driver's "
    "library; take the folder `stubs` out of LD_LIBRARY_PATH",
    "DEVICE_UNAVAILABLE": "another process uses the GPU exclusively (nvidia-smi lists it)",
    "SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module have different versions, as "
    "after an update; restart the machine",
    "SYSTEM_NOT_READY": "the machine's GPU services do not run; start nvidia-fabricmanager",
    "COMPAT_NOT_SUPPORTED_ON_DEVICE": "the CUDA compatibility package does not serve this GPU; take "
    "it out of LD_LIBRARY_PATH, and update the driver",
    "ERROR_UNKNOWN": "the driver does not respond, as after the machine was suspended, or in "
    "a container without its devices; restart the machine, or run the container with --gpus all",
    "ILLEGAL_ADDRESS": "a kernel read or wrote where it must not: this is a bug of trtq; nothing more "
    "runs in this process",
    "LAUNCH_TIMEOUT": "the display watchdog stopped a kernel; use a smaller batch",
    "INVALID_CONTEXT": "this thread has no CUDA context",
}


def _advice(status: str) -> str:
    if status.endswith("NO_DEVICE"):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"{status}: there is no NVIDIA GPU that this process may use" + (
            "" if seen is None else f"; CUDA_VISIBLE_DEVICES is {seen!r}"
        )
    found = [text for name, text in _ADVICE.items() if status.endswith(name)]
    return f"{status}: {found[0]}" if found else status


class CudaDevice:
    """The device of the calling thread's CUDA context.

    Args:
        context: its handle as an integer; modules belong to it.

    Raises:
        KernelError: there is no driver or no context.
    """

    def __init__(self, context: int) -> None:
        what = "cannot ask the GPU what it is"
        device = _call("cuCtxGetDevice", what=what)
        attribute = _driver().CUdevice_attribute

        def ask(name: str) -> int:
            found = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_call("cuDeviceGetAttribute", found, device, what=what))

        self.context = context
        major, minor = ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")
        if (major, minor) < _OLDEST:
            raise KernelError(
                f"our kernels need a GPU of compute capability 7.5 (RTX 20) or later, this one has "
                f"{major}.{minor}; the openvino and cuda providers run its ONNX folder"
            )
        self.architecture = f"sm{major}{minor}"
        self.processors = ask("MULTIPROCESSOR_COUNT")
        self._functions: dict[Variant, tuple[Any, Any]] = {}

    def _function(self, variant: Variant, shared_bytes: int) -> Any:
        if variant not in self._functions:
            what = f"cannot load {variant} for {self.architecture}"
            module = _call("cuModuleLoadData", cubin(variant, self.architecture), what=what)
            function = _call("cuModuleGetFunction", module, variant.kernel.encode(), what=what)
            if shared_bytes >= _USUAL_SHARED_BYTES:
                most = _driver().CUfunction_attribute
                name = most.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call("cuFuncSetAttribute", function, name, shared_bytes, what=what)
            self._functions[variant] = module, function
        return self._functions[variant][1]

    def prepare(self, launch: Launch) -> None:
        """Compile and load a kernel, which cannot be done while a CUDA graph is captured.

        Raises:
            KernelError: it cannot be compiled or loaded.
        """
        self._function(launch.variant, launch.shared_bytes)

    def start(self, launch: Launch, stream: int) -> None:
        """Start a kernel on a stream; returns before it is done.

        Raises:
            KernelError: it cannot be compiled, loaded or started.
        """
        function = self._function(launch.variant, launch.shared_bytes)
        values = (ctypes.c_void_p * len(launch.arguments))(
            *(ctypes.addressof(argument) for argument in launch.arguments)
        )
        block = (launch.threads, 1, 1)
        _call(
            "cuLaunchKernel",
            function,
            *launch.grid,
            *block,
            launch.shared_bytes,
            stream,
            ctypes.addressof(values),
            0,
            what=f"cannot start {launch.variant} on {self.architecture}",
        )


@cache
def _device_of(number: int, context: int) -> CudaDevice:
    return CudaDevice(context)


@cache
def _primary_context(index: int) -> Any:
    """The context that torch, TensorRT and CUDA's runtime share; held until the process ends."""
    what = f"GPU {index} cannot be used"
    device = _call("cuDeviceGet", index, what=what)
    return _call("cuDevicePrimaryCtxRetain", device, what=what)


def current_device(index: int | None = None) -> CudaDevice:
    """The device of the calling thread's context; kernels loaded before stay loaded.

    Args:
        index: CUDA's number of the GPU whose primary context the thread is given if it has none; None:
            it must have one.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver for it, or the thread has no context.
    """
    what = "no GPU can be used"
    _check_driver()
    context = int(_call("cuCtxGetCurrent", what=what))
    if context == 0:
        if index is None:
            raise KernelError(f"{what}: this thread has no CUDA context")
        context = _primary_context(index)
        _call("cuCtxSetCurrent", context, what=f"GPU {index} cannot be used by this thread")
        context = int(context)
    # After a reset another context may lie at the same address, without our modules.
    return _device_of(int(_call("cuCtxGetId", context, what=what)), context)


def first_gpu() -> Any:
    """The driver's handle of the first GPU that this process may use.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver for it, or no GPU.
    """
    _check_driver()
    return _call("cuDeviceGet", 0, what="no GPU can be used")


class Gpu:
    """Memory and one stream of the first GPU, for those who have no torch with CUDA.

    The calling thread has the GPU's primary context afterwards.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        what = "no GPU can be used"
        self._context = _call("cuDevicePrimaryCtxRetain", first_gpu(), what=what)
        self.enter()
        self.stream = int(_call("cuStreamCreate", _NON_BLOCKING, what=what))

    def enter(self) -> None:
        """Let the calling thread use it; every thread has to be told."""
        _call("cuCtxSetCurrent", self._context, what="the GPU cannot be used by this thread")

    def allocate(self, size: int) -> int:
        """Address of new memory of at least one byte."""
        what = f"cannot have {size} bytes of the GPU's memory"
        return int(_call("cuMemAlloc", max(size, 1), what=what))

    def free(self, address: int) -> None:
        """Give memory back."""
        _call("cuMemFree", address, what="cannot free memory of the GPU")

    def upload(self, address: int, host: Any) -> None:
        """Copy a contiguous numpy array to the device, in the stream's order."""
        size, source = host.nbytes, host.ctypes.data
        _call(
            "cuMemcpyHtoDAsync", address, source, size, self.stream, what="cannot copy to the GPU"
        )

    def download(self, host: Any, address: int) -> None:
        """Copy to a contiguous numpy array, in the stream's order."""
        size, target = host.nbytes, host.ctypes.data
        _call(
            "cuMemcpyDtoHAsync", target, address, size, self.stream, what="cannot copy from the GPU"
        )

    def wait(self) -> None:
        """Until all that the stream was given is done."""
        _call("cuStreamSynchronize", self.stream, what="the GPU failed")
