"""The worker process of a row: its device, memory and energy."""

from types import SimpleNamespace

import pytest
from torch import nn

from trtq.bench.device import GpuMemory
from trtq.bench.measured import _import_libraries
from trtq.bench.worker import MeasuredArtefact
from trtq.engine.denoiser import EngineDenoiser


def engine_denoiser(provider):
    denoiser = EngineDenoiser.__new__(EngineDenoiser)
    nn.Module.__init__(denoiser)
    denoiser.engine = SimpleNamespace(provider=provider)
    return denoiser


class OnCuda(nn.Module):
    """A module whose weights are on a GPU."""

    def state_dict(self):
        return {"weight": SimpleNamespace(is_cuda=True, numel=lambda: 2, element_size=lambda: 4)}


class Driver:
    """A driver that reports 10 MiB and one joule more at each query."""

    def __init__(self):
        self.asked = 0

    @property
    def memory(self):
        self.asked += 1
        return GpuMemory(self.asked * 10 << 20, None)

    @property
    def joules(self):
        self.asked += 1
        return float(self.asked)


@pytest.fixture
def opened(monkeypatch):
    """Open an artefact with a given denoiser; return the artefact and the result of `open`."""

    def open_artefact(denoiser, provider):
        source = SimpleNamespace(
            denoiser=denoiser,
            prompts=None,
            pipeline=SimpleNamespace(unet=denoiser),
            sample_shape=(1, 8, 8),
            model_class="UNet2DModel",
            guidance=1.0,
            classes=None,
        )
        monkeypatch.setattr("trtq.bench.worker.open_any", lambda *_: source)
        monkeypatch.setattr("trtq.bench.measured._import_libraries", lambda *_: None)
        monkeypatch.setattr("trtq.bench.measured.Nvml", Driver)
        artefact = MeasuredArtefact()
        return artefact, artefact.open("somewhere", provider, 1, None)

    return open_artefact


@pytest.mark.parametrize(
    ("provider", "device"),
    [
        ("cpu", "cpu"),
        ("openvino", "cpu"),
        ("cuda", "gpu"),
        ("tensorrt", "gpu"),
        ("tensorrt-rtx", "gpu"),
    ],
)
def test_a_graph_is_on_the_device_of_its_provider(opened, provider, device):
    artefact, properties = opened(engine_denoiser(provider), provider)
    assert properties["device"] == device
    assert ("gpu_bytes" in artefact.memory()) == (device == "gpu")


def test_a_run_in_torch_is_on_the_device_of_its_weights(opened):
    assert opened(nn.Linear(1, 1), "torch")[1]["device"] == "cpu"
    artefact, properties = opened(OnCuda(), "torch")
    assert properties["device"] == "gpu"
    memory = artefact.memory()
    assert (memory["gpu_weights_bytes"], memory["gpu_bytes"]) == (10 << 20, 30 << 20)


@pytest.mark.parametrize(
    ("kind", "provider", "library"),
    [
        ("onnx", "cpu", ["onnxruntime"]),
        ("engine", "tensorrt-rtx", ["tensorrt_rtx"]),
        ("engine", "tensorrt", ["tensorrt"]),
        ("run", "torch", []),
    ],
)
def test_a_row_imports_only_its_runtime(tmp_path, monkeypatch, kind, provider, library):
    imported = []
    monkeypatch.setattr("trtq.bench.measured.require", imported.append)
    monkeypatch.setattr("trtq.bench.measured.import_module", imported.append)
    monkeypatch.setattr("trtq.bench.measured.artefact_kind", lambda folder: kind)
    monkeypatch.setattr("trtq.bench.measured.import_classes", lambda folder: None)
    _import_libraries(str(tmp_path), provider)
    assert imported == library


@pytest.mark.parametrize(("on_gpu", "joules"), [(True, 1.0), (False, None)])
def test_measures_energy_only_on_a_gpu(opened, monkeypatch, on_gpu, joules):
    monkeypatch.setattr("trtq.bench.worker.draw", lambda *_, **__: None)
    artefact, _ = opened(OnCuda() if on_gpu else nn.Linear(1, 1), "torch")
    sampling = {"steps": 1, "seed": 0, "guidance": 1.0, "prompts": None}
    assert artefact.draw(batch=1, turn=0, out=None, **sampling)["joules"] == joules
