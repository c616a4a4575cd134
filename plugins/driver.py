"""The GPU that is there, through CUDA's driver: loads our cubins and starts them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins.compile import cubin
from trtq.plugins.launch import Launch
from trtq.plugins.spec import Variant

__all__ = ["CudaDevice", "Gpu", "current_device", "first_gpu"]

_USUAL_SHARED_BYTES = 48 << 10
"""A kernel must be told before it may have more."""


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise MissingDependencyError(
            "our kernels are started through cuda-bindings, which is not installed: "
            "pip install 'trtq[plugins]'"
        ) from err
    return driver


def _call(function: str, *arguments: Any, what: str) -> Any:
    """Call the driver; gives its results without the status.

    Raises:
        KernelError: the driver is not there, or says no.
    """
    driver = _driver()
    try:
        status, *results = getattr(driver, function)(*arguments)
    except RuntimeError as err:  # The library itself cannot be loaded.
        raise KernelError(f"{what}: there is no NVIDIA driver on this machine") from err
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"{what}: {_advice(status.name)}")
    return results[0] if len(results) == 1 else results


def _advice(status: str) -> str:
    too_old = ("NO_BINARY_FOR_GPU", "INVALID_IMAGE", "UNSUPPORTED_PTX_VERSION", "INVALID_SOURCE")
    if any(name in status for name in too_old):
        return (
            f"{status}: the driver is too old for kernels of this NVRTC; update it, or install the "
            "nvidia-cuda-nvrtc of the CUDA version that nvidia-smi shows, and empty the kernel cache"
        )
    if "OUT_OF_MEMORY" in status:
        return f"{status}: the GPU's memory is full"
    return status


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
def _device_of(context: int) -> CudaDevice:
    return CudaDevice(context)


def current_device() -> CudaDevice:
    """The device of the calling thread's context; kernels loaded before stay loaded.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or the thread has no context.
    """
    context = int(_call("cuCtxGetCurrent", what="no GPU can be used"))
    if context == 0:
        raise KernelError("no GPU can be used: this thread has no CUDA context")
    return _device_of(context)


def first_gpu() -> Any:
    """The driver's handle of the first GPU.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or no GPU.
    """
    _call("cuInit", 0, what="no GPU can be used")
    return _call("cuDeviceGet", 0, what="no GPU can be used")


class Gpu:
    """Memory and one stream of the first GPU, for those who have no torch with CUDA.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        what = "no GPU can be used"
        self._context = _call("cuDevicePrimaryCtxRetain", first_gpu(), what=what)
        self.enter()
        self.stream = int(_call("cuStreamCreate", 0, what=what))

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
