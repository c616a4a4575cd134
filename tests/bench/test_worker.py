"""The process of a row: where it says that it ran, and what it counts there."""

from types import SimpleNamespace

import pytest
from torch import nn

from trtq.bench.device import GpuMemory
from trtq.bench.worker import MeasuredArtefact, _import_libraries
from trtq.engine.denoiser import EngineDenoiser


def engine_denoiser(provider):
    found = EngineDenoiser.__new__(EngineDenoiser)
    nn.Module.__init__(found)
    found.engine = SimpleNamespace(provider=provider)
    return found


class OnCuda(nn.Module):
    """What torch says of a module that was moved to a GPU."""

    def state_dict(self):
        return {"weight": SimpleNamespace(is_cuda=True, numel=lambda: 2, element_size=lambda: 4)}


class Driver:
    """Counts 10 MiB more of this process each time it is asked, and a joule."""

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
    """A subject whose artefact has a given denoiser, and what it said when it opened it."""

    def open_subject(denoiser, provider):
        source = SimpleNamespace(
            denoiser=denoiser,
            prompts=None,
            pipeline=SimpleNamespace(),
            sample_shape=(1, 8, 8),
            model_class="UNet2DModel",
            guidance=1.0,
            classes=None,
        )
        monkeypatch.setattr("trtq.bench.worker.open_any", lambda *_: source)
        monkeypatch.setattr("trtq.bench.worker._import_libraries", lambda *_: None)
        monkeypatch.setattr("trtq.bench.worker.Nvml", Driver)
        subject = MeasuredArtefact()
        return subject, subject.open("somewhere", provider, 1, None)

    return open_subject


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
def test_a_graph_is_where_its_provider_computes(opened, provider, device):
    subject, said = opened(engine_denoiser(provider), provider)
    assert said["device"] == device
    assert ("gpu_bytes" in subject.memory()) == (device == "gpu")


def test_a_run_in_torch_is_where_its_weights_are(opened):
    assert opened(nn.Linear(1, 1), "torch")[1]["device"] == "cpu"
    subject, said = opened(OnCuda(), "torch")
    assert said["device"] == "gpu"
    found = subject.memory()
    assert (found["gpu_weights_bytes"], found["gpu_bytes"]) == (10 << 20, 30 << 20)


@pytest.mark.parametrize(
    ("kind", "provider", "library"),
    [
        ("onnx", "cpu", ["onnxruntime"]),
        ("engine", "tensorrt-rtx", ["tensorrt_rtx"]),
        ("engine", "tensorrt", ["tensorrt"]),
        ("run", "torch", []),
    ],
)
def test_a_row_asks_for_its_own_runtime_only(tmp_path, monkeypatch, kind, provider, library):
    asked = []
    monkeypatch.setattr("trtq.bench.worker.require", asked.append)
    monkeypatch.setattr("trtq.bench.worker.import_module", asked.append)
    monkeypatch.setattr("trtq.bench.worker.artefact_kind", lambda folder: kind)
    monkeypatch.setattr("trtq.bench.worker.import_classes", lambda folder: None)
    _import_libraries(str(tmp_path), provider)
    assert asked == library


@pytest.mark.parametrize(("on_gpu", "joules"), [(True, 1.0), (False, None)])
def test_energy_is_counted_of_what_runs_on_the_gpu(opened, monkeypatch, on_gpu, joules):
    monkeypatch.setattr("trtq.bench.worker.draw", lambda *_, **__: None)
    subject, _ = opened(OnCuda() if on_gpu else nn.Linear(1, 1), "torch")
    sampling = {"steps": 1, "seed": 0, "guidance": 1.0, "prompts": None}
    assert subject.draw(batch=1, turn=0, out=None, **sampling)["joules"] == joules
