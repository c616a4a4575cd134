"""Errors of the driver, with a fake driver."""

import ctypes
import re
from enum import IntEnum
from types import SimpleNamespace

import pytest

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins import device as devices
from trtq.plugins import driver as driving
from trtq.plugins.device import CudaDevice, Gpu, current_device
from trtq.plugins.launch import Launch
from trtq.plugins.variants import TILES, Variant


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """A fake driver with one Ada GPU; `refuses` maps names of failing calls to errors."""

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
            "cuCtxGetId": lambda _: 1,
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
        monkeypatch.setattr(driving, "bindings", lambda: driver)
        monkeypatch.setattr(driving, "driver_cuda", lambda: (13, 0))
        monkeypatch.setattr(driving, "old_driver", lambda: None)
        driving.check_driver.cache_clear()
        monkeypatch.setattr(devices, "cubin", lambda variant, architecture: b"cubin")
        return driver

    return install


def launch(tile=TILES[1]):
    variant = Variant("low_bit", True, False, 8, False, tile)
    arguments = (ctypes.c_int(3), ctypes.c_void_p(64))
    return Launch(variant, (1, 2, 3), tile.threads, variant.shared_bytes, arguments)


def test_a_kernel_is_loaded_once_with_its_shared_memory_attribute(use):
    driver = use()
    device = CudaDevice(1)
    assert (device.architecture, device.processors) == ("sm89", 128)
    for _ in range(2):
        device.start(launch(), stream=5)
    names = [name for name, _ in driver.calls]
    assert names.count("cuModuleLoadData") == names.count("cuFuncSetAttribute") == 1
    started = [arguments for name, arguments in driver.calls if name == "cuLaunchKernel"]
    assert len(started) == 2
    assert started[0][:9] == (7, 1, 2, 3, 256, 1, 1, TILES[1].shared_bytes(), 5)


def test_the_error_for_an_old_driver_names_the_remedy(use):
    use(cuModuleLoadData=Status.CUDA_ERROR_NO_BINARY_FOR_GPU)
    with pytest.raises(
        KernelError, match=r"low_bit-f16-w8-nchw-128x128 for sm89.*too old.*update it"
    ):
        CudaDevice(1).start(launch(), stream=0)


def test_a_kernel_that_cannot_start_is_named(use):
    use(cuLaunchKernel=Status.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(KernelError, match="cannot start low_bit-f16-w8-nchw-128x128 on sm89"):
        CudaDevice(1).start(launch(), stream=0)


def test_full_memory_is_reported(use):
    use(cuMemAlloc=Status.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(KernelError, match=r"cannot allocate 100 bytes.*memory is full"):
        Gpu().allocate(100)


def test_a_thread_without_a_context_is_reported(use):
    use()
    with pytest.raises(KernelError, match="this thread has no CUDA context"):
        current_device()


@pytest.mark.parametrize(
    ("driver", "bindings", "nvrtc", "wanted"),
    [
        ((13, 0), "13.5.0", (13, 5), None),
        ((14, 1), "13.5.0", (13, 5), None),
        ((12, 4), "12.9.10", (12, 8), None),
        (None, "13.5.0", (13, 5), None),
        ((12, 4), None, (13, 5), None),
        ((12, 4), "13.5.0", None, "580 or later.*CUDA 13, you have 550.*'cuda-bindings<13'"),
        ((12, 9), "13.5.0", (12, 9), "580 or later.*you have 575"),
        # cuda-bindings 12.9 loads NVRTC 13 if it is installed, whose kernels this driver rejects.
        ((12, 9), "12.9.10", (13, 5), "580 or later.*pip uninstall nvidia-cuda-nvrtc"),
        (
            (11, 8),
            "12.9.10",
            (12, 8),
            r"525 or later is needed for CUDA 12.*\(?CUDA 11.8\)?; update",
        ),
        ((13, 0), "14.0.0", (14, 0), "a driver for CUDA 14 is needed.*you have 580"),
    ],
)
def test_a_driver_must_be_as_new_as_the_packages(driver, bindings, nvrtc, wanted, monkeypatch):
    import sys

    def version():
        if nvrtc is None:
            raise MissingDependencyError("no NVRTC")
        return nvrtc

    package = None if bindings is None else SimpleNamespace(__version__=bindings)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=package))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setattr(driving, "driver_cuda", lambda: driver)
    monkeypatch.setattr(driving, "nvrtc_version", version)
    advice = driving.old_driver()
    assert (advice is None) == (wanted is None)
    if wanted is not None:
        assert re.search(wanted, advice), advice
        # Older packages are recommended only for drivers of CUDA 12.
        assert ("cuda-bindings<13" in advice) == (driver[0] == 12)


@pytest.mark.parametrize(("platform", "name"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_drivers_library_has_its_systems_name(platform, name, monkeypatch):
    asked = []

    def load(library):
        asked.append(library)
        raise OSError

    monkeypatch.setattr(driving.ctypes, "CDLL", load)
    monkeypatch.setattr(driving.sys, "platform", platform)
    driving._library.cache_clear()
    assert (driving.driver_cuda(), driving.first_gpu_uuid()) == (None, None)
    assert asked == [name]
    driving._library.cache_clear()


def test_a_driver_without_a_function_is_reported_as_old(use, monkeypatch):
    class Old:
        def __getattr__(self, name):
            raise RuntimeError(f"function {name} is not found")

    use()
    monkeypatch.setattr(driving, "bindings", Old)
    with pytest.raises(KernelError, match=r"the driver is too old, update it \(function cuInit"):
        Gpu()


def test_a_missing_driver_is_reported(monkeypatch):
    class Missing:
        def __getattr__(self, name):
            raise RuntimeError("libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(driving, "bindings", Missing)
    monkeypatch.setattr(driving, "driver_cuda", lambda: None)
    driving.check_driver.cache_clear()
    with pytest.raises(KernelError, match="there is no NVIDIA driver on this machine"):
        Gpu()


def test_without_the_package_its_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"trtq\[plugins\]"):
        driving.bindings()
