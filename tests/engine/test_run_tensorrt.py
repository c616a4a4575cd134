"""Running engines with a fake of TensorRT, so that the tests need no GPU."""

import threading

import numpy as np
import pytest

import trtq
from tests.engine.fake_tensorrt import Memory, fake_module
from trtq.engine.tensorrt import run as running
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.run import TensorRtEngine, open_tensorrt
from trtq.errors import ArtefactError, KernelError, UsageError
from trtq.pipelines.inspect import inspect

RTX = BACKENDS["tensorrt-rtx"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(running, "register", lambda trt: None)
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


def test_buffers_of_inputs_and_outputs_grow(file):
    memory, module = Memory(), fake_module()
    engine = TensorRtEngine(file, RTX, module, memory, {"key": "value"})
    assert engine.provider == "tensorrt-rtx"
    assert engine.inputs["x"].shape == ("x_0", 3)
    assert engine.metadata == {"key": "value"}
    for batch in (2, 1, 4, 2):
        x = np.arange(3 * batch, dtype=np.float64).reshape(batch, 3)
        assert np.array_equal(engine.run({"x": x})["y"], x + 1)
    assert len(memory.areas) == 4
    assert len(memory.freed) == 2
    assert module.engine.config.cuda_graph_strategy == "whole"


def test_the_calling_thread_makes_the_cuda_context_current(file):
    """A server denoises in a separate thread, and each thread has its own current CUDA context."""
    memory = Memory()
    engine = TensorRtEngine(file, RTX, fake_module(), memory)
    thread = threading.Thread(target=engine.run, args=({"x": np.zeros((1, 3))},))
    thread.start()
    thread.join()
    assert memory.entered == thread.ident


def test_kernels_compiled_on_first_use_are_cached(file, tmp_path):
    """The cache is saved for every new shape, since new shapes compile more kernels."""
    module = fake_module()
    engine = TensorRtEngine(file, RTX, module, Memory())
    for batch in (1, 3, 1):
        engine.run({"x": np.zeros((batch, 3))})
    assert module.cache.restored is None
    TensorRtEngine(file, RTX, module, Memory())
    assert module.cache.restored == b"kernels of 3"
    assert [path.suffix for path in (tmp_path / "cache" / "runtime").iterdir()] == [".bin"]


def test_an_unwritable_cache_is_reported_once(file, tmp_path, monkeypatch, caplog):
    engine = TensorRtEngine(file, RTX, fake_module(), Memory())
    (tmp_path / "cache").write_text("")
    for batch in (1, 2):
        engine.run({"x": np.zeros((batch, 3))})
    assert caplog.text.count("the runtime cache cannot be kept") == 1


@pytest.mark.parametrize(("automatic", "budget"), [(300, 300), (5000, 1000), (0, 0)])
def test_the_free_memory_is_the_budget_of_streamed_weights(file, automatic, budget):
    """Without a budget TensorRT keeps all weights on the GPU."""
    module = fake_module(streamable=1000, automatic=automatic)
    TensorRtEngine(file, RTX, module, Memory())
    assert module.engine.budget_of_context == budget


def test_an_error_of_a_plugin_is_raised_by_the_engine(file):
    engine = TensorRtEngine(file, RTX, fake_module(raises="cannot start low_bit on sm89"), Memory())
    for _ in range(2):
        with pytest.raises(ArtefactError) as caught:
            engine.run({"x": np.zeros((1, 3))})
        wanted = "the engine failed: plugin LowBitLinear: cannot start low_bit on sm89"
        assert str(caught.value) == wanted


def test_a_runtime_that_cannot_start_raises_one_error(file):
    message = (
        "tensorrt-rtx cannot start on this machine: CUDA initialization failure with error: 35"
    )
    with pytest.raises(UsageError, match=message):
        TensorRtEngine(file, RTX, fake_module(starts=False), Memory())


def test_the_inspected_layers_have_names(file):
    rows = TensorRtEngine(file, RTX, fake_module(), Memory()).describe()
    assert rows == [{"Name": "first"}, {"Name": "second", "Precision": "INT8"}]


def test_a_shape_outside_the_profile_names_the_range(file):
    engine = TensorRtEngine(file, RTX, fake_module(), Memory())
    with pytest.raises(
        UsageError, match=r"'x' of shape \[5, 3\]; it supports \[1, 3\] \.\. \[4, 3\]"
    ):
        engine.run({"x": np.zeros((5, 3))})


def test_an_engine_of_another_version_must_be_rebuilt(file):
    with pytest.raises(ArtefactError, match="Version tag does not match; build it again"):
        TensorRtEngine(file, RTX, fake_module(loads=False), Memory())


def test_a_failing_engine_raises_an_error(file):
    engine = TensorRtEngine(file, RTX, fake_module(works=False), Memory())
    with pytest.raises(ArtefactError, match="the engine failed"):
        engine.run({"x": np.zeros((1, 3))})


@pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
def test_the_error_without_a_gpu_names_the_alternative(file, monkeypatch):

    def no_gpu():
        raise KernelError("no GPU can be used: there is no NVIDIA driver on this machine")

    monkeypatch.setattr(running, "Gpu", no_gpu)
    with pytest.raises(UsageError, match=r"no NVIDIA driver.*trtq generate ONNX --provider"):
        open_tensorrt(file, "tensorrt-rtx")


@pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
def test_an_engine_folder_is_loaded_as_a_pipeline(digits_onnx, tmp_path, monkeypatch):
    """The folder is loaded like any other artefact; the denoiser runs the engine in the folder."""
    from trtq.engine.ort import OrtEngine

    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "engine"
    trtq.build(digits_onnx, out, architectures=["sm89"])
    opened = []

    def pretend(path, provider, metadata):
        opened.append((path, provider))
        return OrtEngine(digits_onnx / "unet" / "model.onnx")

    monkeypatch.setattr("trtq.engine.open.open_tensorrt", pretend)
    pipeline = trtq.load(out)
    images = pipeline(class_labels=[3], num_inference_steps=2, output_type="np").images
    assert images.shape[0] == 1
    assert opened == [(out / "unet" / "model.engine", "tensorrt-rtx")]
    monkeypatch.setattr("trtq.pipelines.inspect.obstacle", lambda backend: f"no GPU for {backend}")
    result = inspect(out)
    assert result["engine_layers"] is None
    assert result["engine_layers_missing"] == "no GPU for tensorrt-rtx"
    with pytest.raises(UsageError, match="folder of engines; run it with tensorrt-rtx, not cpu"):
        trtq.load(out, provider="cpu")
