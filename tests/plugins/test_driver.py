"""What the driver says no to, against a stand-in for it."""

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import pytest

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins import driver as driving
from trtq.plugins.driver import CudaDevice, Gpu, current_device
from trtq.plugins.launch import Launch
from trtq.plugins.spec import TILES, Variant


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """One Ada GPU; `refuses` names calls that fail, and how."""

    CUresult = Status
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, **refuses):
        self.refuses = refuses
        self.calls = []

    def __getattr__(self, name):
        answers = {
            "cuDeviceGetAttribute": lambda which, _: {75: 8, 76: 9, 16: 128}[which],
            "cuCtxGetCurrent": lambda: 0,
        }

        def call(*arguments):
            self.calls.append((name, arguments))
            status = self.refuses.get(name, Status.CUDA_SUCCESS)
            return status, answers.get(name, lambda *_: 7)(*arguments)

        return call


@pytest.fixture
def use(monkeypatch):
    def install(**refuses):
        driver = Driver(**refuses)
        monkeypatch.setattr(driving, "_driver", lambda: driver)
        monkeypatch.setattr(driving, "cubin", lambda variant, architecture: b"cubin")
        return driver

    return install


def launch(tile=TILES[2]):
    variant = Variant("low_bit", True, False, 4, False, tile)
    arguments = (ctypes.c_int(3), ctypes.c_void_p(64))
    return Launch(variant, (1, 2, 3), tile.threads, tile.shared_bytes, arguments)


def test_a_kernel_is_loaded_once_and_told_of_its_shared_memory(use):
    driver = use()
    device = CudaDevice(1)
    assert (device.architecture, device.processors) == ("sm89", 128)
    for _ in range(2):
        device.start(launch(), stream=5)
    names = [name for name, _ in driver.calls]
    assert names.count("cuModuleLoadData") == names.count("cuFuncSetAttribute") == 1
    started = [arguments for name, arguments in driver.calls if name == "cuLaunchKernel"]
    assert len(started) == 2
    assert started[0][:9] == (7, 1, 2, 3, 256, 1, 1, TILES[2].shared_bytes, 5)


def test_a_driver_older_than_the_kernel_says_what_to_do(use):
    use(cuModuleLoadData=Status.CUDA_ERROR_NO_BINARY_FOR_GPU)
    with pytest.raises(KernelError, match=r"low_bit-f16-w4-128x256 for sm89.*too old.*update it"):
        CudaDevice(1).start(launch(), stream=0)


def test_a_kernel_that_cannot_start_is_named(use):
    use(cuLaunchKernel=Status.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(KernelError, match="cannot start low_bit-f16-w4-128x256 on sm89"):
        CudaDevice(1).start(launch(), stream=0)


def test_full_memory_is_said(use):
    use(cuMemAlloc=Status.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(KernelError, match=r"cannot have 100 bytes.*memory is full"):
        Gpu().allocate(100)


def test_a_thread_without_a_context_is_told(use):
    use()
    with pytest.raises(KernelError, match="this thread has no CUDA context"):
        current_device()


def test_without_a_driver_that_is_said(monkeypatch):
    class Missing:
        def __getattr__(self, name):
            raise RuntimeError("libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(driving, "_driver", Missing)
    with pytest.raises(KernelError, match="there is no NVIDIA driver on this machine"):
        Gpu()


def test_without_the_package_its_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"trtq\[plugins\]"):
        driving._driver()
