"""The GPU: loading and starting kernels, and memory for callers without torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtq.errors import KernelError
from trtq.plugins import driver
from trtq.plugins.compile import cubin
from trtq.plugins.launch import Launch
from trtq.plugins.variants import Variant

__all__ = ["CudaDevice", "Gpu", "KernelResources", "current_device", "first_gpu"]

_DEFAULT_SHARED_BYTES = 48 << 10
"""Default limit of shared memory per block, in bytes; a kernel needs an attribute to use more."""
_NON_BLOCKING = 1
"""Flag of a stream that does not synchronise with the legacy default stream."""
_MIN_CAPABILITY = (7, 5)
"""First compute capability whose tensor cores multiply integers."""


@dataclass(frozen=True)
class KernelResources:
    """What a loaded kernel takes of a processor, as the driver reports it.

    Attributes:
        registers: registers of a thread.
        local_bytes: local memory of a thread: spilled registers and stack.
        static_bytes: static shared memory of a block.
        blocks: number of blocks that a processor holds at once.
    """

    registers: int
    local_bytes: int
    static_bytes: int
    blocks: int


class CudaDevice:
    """The device of the calling thread's CUDA context.

    Args:
        context: handle of the context as an integer; loaded modules belong to the context.

    Raises:
        KernelError: there is no driver or no context.
    """

    def __init__(self, context: int) -> None:
        what = "cannot read the GPU's properties"
        device = driver.call("cuCtxGetDevice", what=what)
        attribute = driver.bindings().CUdevice_attribute

        def ask(name: str) -> int:
            number = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(driver.call("cuDeviceGetAttribute", number, device, what=what))

        self.context = context
        major, minor = ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")
        if (major, minor) < _MIN_CAPABILITY:
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
            module = driver.call("cuModuleLoadData", cubin(variant, self.architecture), what=what)
            function = driver.call(
                "cuModuleGetFunction", module, variant.kernel.encode(), what=what
            )
            if shared_bytes >= _DEFAULT_SHARED_BYTES:
                attributes = driver.bindings().CUfunction_attribute
                number = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.call("cuFuncSetAttribute", function, number, shared_bytes, what=what)
            self._functions[variant] = module, function
        return self._functions[variant][1]

    def prepare(self, launch: Launch) -> None:
        """Compile and load a kernel; loading is impossible during the capture of a CUDA graph.

        Raises:
            KernelError: the kernel cannot be compiled or loaded.
        """
        self._function(launch.variant, launch.shared_bytes)

    def resources(self, variant: Variant) -> KernelResources:
        """Load a kernel and ask the driver what it takes.

        Raises:
            KernelError: the kernel cannot be compiled or loaded.
        """
        function = self._function(variant, variant.shared_bytes)
        what = f"cannot read the properties of {variant}"
        attribute = driver.bindings().CUfunction_attribute

        def ask(name: str) -> int:
            number = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
            return int(driver.call("cuFuncGetAttribute", number, function, what=what))

        blocks = driver.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            function,
            variant.threads,
            variant.shared_bytes,
            what=what,
        )
        return KernelResources(
            registers=ask("NUM_REGS"),
            local_bytes=ask("LOCAL_SIZE_BYTES"),
            static_bytes=ask("SHARED_SIZE_BYTES"),
            blocks=int(blocks),
        )

    def start(self, launch: Launch, stream: int) -> None:
        """Start a kernel on a stream, asynchronously.

        Args:
            launch: kernel, grid and arguments.
            stream: handle of a CUDA stream.

        Raises:
            KernelError: the kernel cannot be compiled, loaded or started.
        """
        function = self._function(launch.variant, launch.shared_bytes)
        values = (ctypes.c_void_p * len(launch.arguments))(
            *(ctypes.addressof(argument) for argument in launch.arguments)
        )
        block = (launch.threads, 1, 1)
        driver.call(
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
    """The primary context, shared with torch, TensorRT and CUDA's runtime; retained until exit."""
    what = f"GPU {index} cannot be used"
    device = driver.call("cuDeviceGet", index, what=what)
    return driver.call("cuDevicePrimaryCtxRetain", device, what=what)


def current_device(index: int | None = None) -> CudaDevice:
    """The device of the calling thread's context, with the kernels loaded so far.

    Args:
        index: CUDA's index of the GPU whose primary context is set if the thread has no context; None:
            the thread must have a context.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: the driver is missing or too old, or the thread has no context.
    """
    what = "no GPU can be used"
    driver.check_driver()
    context = int(driver.call("cuCtxGetCurrent", what=what))
    if context == 0:
        if index is None:
            raise KernelError(f"{what}: this thread has no CUDA context")
        context = _primary_context(index)
        driver.call("cuCtxSetCurrent", context, what=f"GPU {index} cannot be used by this thread")
        context = int(context)
    # After a reset another context, without our modules, may have the same handle.
    return _device_of(int(driver.call("cuCtxGetId", context, what=what)), context)


def first_gpu() -> Any:
    """The driver's handle of the first GPU that is visible to this process.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: the driver is missing or too old, or there is no GPU.
    """
    driver.check_driver()
    return driver.call("cuDeviceGet", 0, what="no GPU can be used")


class Gpu:
    """Memory and one stream of the first GPU, for callers without torch for CUDA.

    The constructor makes the GPU's primary context current in the calling thread.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        KernelError: the driver is missing or too old, or there is no GPU.
    """

    def __init__(self) -> None:
        what = "no GPU can be used"
        self._context = driver.call("cuDevicePrimaryCtxRetain", first_gpu(), what=what)
        self.enter()
        self.stream = int(driver.call("cuStreamCreate", _NON_BLOCKING, what=what))

    def enter(self) -> None:
        """Make the context current in the calling thread; required once per thread."""
        driver.call("cuCtxSetCurrent", self._context, what="the GPU cannot be used by this thread")

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes, at least one, and return their address."""
        what = f"cannot allocate {size} bytes of the GPU's memory"
        return int(driver.call("cuMemAlloc", max(size, 1), what=what))

    def free(self, address: int) -> None:
        """Free the memory at an address that `allocate` returned."""
        driver.call("cuMemFree", address, what="cannot free memory of the GPU")

    def upload(self, address: int, host: Any) -> None:
        """Copy a contiguous numpy array to device memory, in stream order.

        Args:
            address: device address of the destination.
            host: contiguous numpy array, the source.
        """
        size, source = host.nbytes, host.ctypes.data
        driver.call(
            "cuMemcpyHtoDAsync", address, source, size, self.stream, what="cannot copy to the GPU"
        )

    def download(self, host: Any, address: int) -> None:
        """Copy device memory to a contiguous numpy array, in stream order.

        Args:
            host: contiguous numpy array, the destination.
            address: device address of the source.
        """
        size, destination = host.nbytes, host.ctypes.data
        driver.call(
            "cuMemcpyDtoHAsync",
            destination,
            address,
            size,
            self.stream,
            what="cannot copy from the GPU",
        )

    def wait(self) -> None:
        """Wait for all work in the stream."""
        driver.call("cuStreamSynchronize", self.stream, what="the GPU failed")
