"""Device names, counters and peaks, with a stub for NVIDIA's library."""

import os
import sys
import types

import pytest

from trtq.bench import device
from trtq.bench.cost import count_operations, roofline
from trtq.bench.device import GpuMemory, Nvml, Peak, cpu_peak, gpu_peak


@pytest.fixture
def pynvml(monkeypatch):
    class NVMLError(Exception):
        pass

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetName = lambda device: b"NVIDIA GeForce RTX 4090"
    module.nvmlDeviceGetMigMode = lambda device: (0, 0)
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    module.nvmlDeviceGetTotalEnergyConsumption = lambda device: 2500
    process = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=7 << 20)
    module.nvmlDeviceGetComputeRunningProcesses = lambda device: [process]
    module.nvmlDeviceGetMemoryInfo = lambda device: types.SimpleNamespace(used=9 << 20)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_every_property_is_none_without_a_driver(monkeypatch, pynvml):
    def fail():
        raise pynvml.NVMLError

    pynvml.nvmlInit = fail
    nvml = Nvml()
    assert (nvml.name, nvml.driver, nvml.joules) == (None,) * 3
    assert nvml.memory == GpuMemory(None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml().name is None


def test_reads_name_energy_and_memory_of_a_gpu(pynvml):
    nvml = Nvml()
    assert (nvml.name, nvml.driver) == ("NVIDIA GeForce RTX 4090", "580.1")
    assert (nvml.joules, nvml.memory) == (2.5, GpuMemory(7 << 20, 9 << 20))


@pytest.mark.parametrize("takes", [str, bytes], ids=["text", "bytes"])
def test_reads_the_first_device_of_cuda(takes, pynvml, monkeypatch):
    """NVML numbers GPUs by bus position; CUDA numbers visible GPUs, fastest first."""

    def by_uuid(uuid):
        if not isinstance(uuid, takes):
            raise TypeError
        return uuid if isinstance(uuid, str) else uuid.decode()

    pynvml.nvmlDeviceGetCount = lambda: 3
    pynvml.nvmlDeviceGetHandleByUUID = by_uuid
    pynvml.nvmlDeviceGetName = lambda handle: f"card {handle}"
    monkeypatch.setattr(device, "first_gpu_uuid", lambda: "GPU-12")
    assert Nvml().name == "card GPU-12"


def test_reads_nothing_if_the_first_device_cannot_be_identified(pynvml, monkeypatch):
    monkeypatch.setattr(device, "first_gpu_uuid", lambda: None)
    pynvml.nvmlDeviceGetCount = lambda: 3
    assert Nvml().name is None
    pynvml.nvmlDeviceGetCount = lambda: 1
    assert Nvml().name == "NVIDIA GeForce RTX 4090"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert Nvml().name is None


def test_reads_clocks_power_and_temperature(pynvml):
    pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU = 1, 2, 0
    pynvml.nvmlDeviceGetClockInfo = lambda device, kind: {1: 2520, 2: 10501}[kind]
    pynvml.nvmlDeviceGetPowerUsage = lambda device: 449_800
    pynvml.nvmlDeviceGetEnforcedPowerLimit = lambda device: 450_000
    pynvml.nvmlDeviceGetTemperature = lambda device, sensor: 71
    assert Nvml().state == {
        "sm_mhz": 2520,
        "memory_mhz": 10501,
        "watts": 449.8,
        "watts_limit": 450.0,
        "celsius": 71,
        "slowed": None,  # The stub lacks this query, like old versions of the module.
    }


def test_unsupported_counters_are_none(pynvml):
    def refuse(device):
        raise pynvml.NVMLError

    pynvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    pynvml.nvmlDeviceGetComputeRunningProcesses = refuse
    assert Nvml().joules is None
    assert Nvml().memory == GpuMemory(None, 9 << 20)


def test_added_memory_is_measured_for_the_process_or_else_for_the_card():
    # The driver lists a process only after its first use of the GPU.
    assert GpuMemory(7, 90).added_to(GpuMemory(None, 80)) == 7
    assert GpuMemory(7, 90).added_to(GpuMemory(5, 80)) == 2
    assert GpuMemory(None, 90).added_to(GpuMemory(None, 80)) == 10
    assert GpuMemory(None, None).added_to(GpuMemory(None, 80)) is None


def test_the_peak_is_looked_up_by_the_full_name():
    peak = gpu_peak("NVIDIA GeForce RTX 4090", integers=True)
    assert (peak.operations, peak.bytes) == pytest.approx((661e12, 1.008e12))
    assert gpu_peak("NVIDIA H100 80GB HBM3", integers=False).operations == 989e12
    assert gpu_peak("NVIDIA A100-SXM4-80GB", integers=False).bytes == pytest.approx(2.039e12)
    for smaller in ("NVIDIA A100-SXM4-40GB", "A100-PCIE-40GB"):
        assert gpu_peak(smaller, integers=False).bytes == pytest.approx(1.555e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GH200 480GB",
        "NVIDIA H200 NVL",
        "NVIDIA H100 PCIe",
        "NVIDIA A100X",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM4-40GB (MIG)",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla T4",
        "NVIDIA",
        "",
    ],
)
def test_similar_names_have_no_known_peak(name):
    assert gpu_peak(name, integers=True) is None
    assert gpu_peak(name, integers=False) is None


def test_a_partitioned_card_is_marked_as_mig(pynvml):
    pynvml.nvmlDeviceGetMigMode = lambda device: (1, 1)
    assert Nvml().name == "NVIDIA GeForce RTX 4090 (MIG)"
    assert gpu_peak(Nvml().name, integers=True) is None


def test_measures_the_peak_of_the_processor():
    peak = cpu_peak(1)
    assert peak.operations > 1e8
    assert peak.bytes > 1e7
    assert "measured in this run" in peak.what


def test_counts_two_operations_per_multiplication():
    import torch

    layer = torch.nn.Linear(3, 5, device="meta")
    assert count_operations(lambda: layer(torch.zeros(2, 3, device="meta"))) == 2 * 2 * 3 * 5
    assert count_operations(lambda: torch.zeros(2, device="meta").tolist()) is None


def test_the_roof_is_the_lower_of_compute_and_memory():
    peak = Peak(operations=100.0, bytes=10.0, what="a toy")
    computing = roofline(200, 10, 4.0, peak)
    assert (computing["bound"], computing["peak_share"]) == ("compute", 0.5)
    assert computing["roof_share"] == 0.5
    reading = roofline(200, 30, 4.0, peak)
    assert (reading["bound"], reading["peak_share"]) == ("memory", 0.5)
    assert reading["roof_share"] == 0.75
    assert reading["operations_per_second"] == 50
