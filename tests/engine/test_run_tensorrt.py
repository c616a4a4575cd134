"""Running engines, against a stand-in for TensorRT: none can be run where tests run."""

import contextlib
import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import trtq
from trtq.engine.tensorrt import run as running
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.run import TensorRtEngine, open_tensorrt
from trtq.errors import ArtefactError, KernelError, UsageError
from trtq.pipelines.inspect import inspect
from trtq.plugins.low_bit import tensorrt as plugins

RTX = BACKENDS["tensorrt-rtx"]


class Memory:
    """The GPU's memory is the host's."""

    stream = 5

    def __init__(self):
        self.areas = {}
        self.freed = []

    def enter(self):
        self.entered = threading.get_ident()

    def allocate(self, size):
        area = ctypes.create_string_buffer(size)
        self.areas[ctypes.addressof(area)] = area
        return ctypes.addressof(area)

    def free(self, address):
        self.freed.append(address)

    def upload(self, address, host):
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host, address):
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def wait(self):
        pass


def stand_in(loads=True, works=True, starts=True, streamable=0, automatic=0, raises=None):
    """A module whose only engine adds one to x[batch, 3], for 1 to 4 items."""

    kept = {"cache": b""}

    def fail(self):
        raise KernelError(raises)

    class Cache:
        restored = None

        def serialize(self):
            return kept["cache"]

        def deserialize(self, content):
            Cache.restored = content

    class Config:
        cuda_graph_strategy = None

        def create_runtime_cache(self):
            return Cache()

        def set_runtime_cache(self, cache):
            pass

    class Context:
        def __init__(self):
            self.addresses = {}

        def set_input_shape(self, name, shape):
            self.shape = shape
            return len(shape) == 2 and 1 <= shape[0] <= 4 and shape[1] == 3

        def get_tensor_shape(self, name):
            return self.shape

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            assert stream == Memory.stream
            if raises is not None:  # As a plugin in Python; TensorRT prints it, and says no more.
                with contextlib.suppress(KernelError):
                    plugins._kept(fail)(SimpleNamespace(plugin_name="LowBitLinear"))
                return False
            kept["cache"] = f"kernels of {self.shape[0]}".encode()
            count = int(np.prod(self.shape))
            x, y = (
                np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))
                for name in "xy"
            )
            y[:] = x + 1
            return works

    class Engine:
        num_io_tensors = 2
        config = None
        streamable_weights_size = streamable
        weight_streaming_budget_v2 = streamable

        def get_weight_streaming_automatic_budget(self):
            return automatic

        def get_tensor_name(self, index):
            return "xy"[index]

        def get_tensor_shape(self, name):
            return (-1, 3)

        def get_tensor_dtype(self, name):
            return "float"

        def get_tensor_mode(self, name):
            return {"x": "in", "y": "out"}[name]

        def get_tensor_profile_shape(self, name, index):
            return (1, 3), (2, 3), (4, 3)

        def create_runtime_config(self):
            Engine.config = Config()
            return Engine.config

        def create_execution_context(self, config):
            Engine.budget_of_context = self.weight_streaming_budget_v2
            return Context()

        def create_engine_inspector(self):
            return Inspector()

    class Inspector:
        def get_engine_information(self, form):
            return {"json": '{"Layers": ["first", {"Name": "second", "Precision": "INT8"}]}'}[form]

    class Logger:
        ERROR = 1

        def __init__(self):
            pass

    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            if not starts:
                logger.log(0, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, content):
            if not loads:
                self.logger.log(0, "Version tag does not match")
            return Engine() if loads else None

    class Module:
        ILogger = Logger
        TensorIOMode = type("TensorIOMode", (), {"INPUT": "in"})
        LayerInformationFormat = type("LayerInformationFormat", (), {"JSON": "json"})
        CudaGraphStrategy = type("CudaGraphStrategy", (), {"WHOLE_GRAPH_CAPTURE": "whole"})

        @staticmethod
        def nptype(_):
            return np.float32

    Module.Runtime, Module.engine, Module.cache = Runtime, Engine, Cache
    return Module


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(running, "register", lambda trt: None)
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


def test_arrays_go_in_and_come_out_in_buffers_that_grow(file):
    memory, module = Memory(), stand_in()
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


def test_another_thread_is_let_in_first(file):
    """A server draws in a thread of its own, and CUDA's context belongs to threads."""
    memory = Memory()
    engine = TensorRtEngine(file, RTX, stand_in(), memory)
    thread = threading.Thread(target=engine.run, args=({"x": np.zeros((1, 3))},))
    thread.start()
    thread.join()
    assert memory.entered == thread.ident


def test_what_was_compiled_on_first_use_is_kept(file, tmp_path):
    """Of every shape: more is compiled for each."""
    module = stand_in()
    engine = TensorRtEngine(file, RTX, module, Memory())
    for batch in (1, 3, 1):
        engine.run({"x": np.zeros((batch, 3))})
    assert module.cache.restored is None
    TensorRtEngine(file, RTX, module, Memory())
    assert module.cache.restored == b"kernels of 3"
    assert [path.suffix for path in (tmp_path / "cache" / "runtime").iterdir()] == [".bin"]


def test_a_cache_that_cannot_be_kept_is_said_once(file, tmp_path, monkeypatch, caplog):
    engine = TensorRtEngine(file, RTX, stand_in(), Memory())
    (tmp_path / "cache").write_text("")
    for batch in (1, 2):
        engine.run({"x": np.zeros((batch, 3))})
    assert caplog.text.count("the runtime cache cannot be kept") == 1


@pytest.mark.parametrize(("automatic", "budget"), [(300, 300), (5000, 1000), (0, 0)])
def test_weights_that_may_be_streamed_get_the_memory_that_is_free(file, automatic, budget):
    """Untold, TensorRT keeps all of them on the GPU, which is what was not to be."""
    module = stand_in(streamable=1000, automatic=automatic)
    TensorRtEngine(file, RTX, module, Memory())
    assert module.engine.budget_of_context == budget


def test_what_a_plugin_raised_is_the_engines_error(file):
    engine = TensorRtEngine(file, RTX, stand_in(raises="cannot start low_bit on sm89"), Memory())
    for _ in range(2):
        with pytest.raises(ArtefactError) as caught:
            engine.run({"x": np.zeros((1, 3))})
        wanted = "the engine failed: plugin LowBitLinear: cannot start low_bit on sm89"
        assert str(caught.value) == wanted


def test_a_runtime_that_cannot_start_is_one_error(file):
    message = (
        "tensorrt-rtx cannot start on this machine: CUDA initialization failure with error: 35"
    )
    with pytest.raises(UsageError, match=message):
        TensorRtEngine(file, RTX, stand_in(starts=False), Memory())


def test_the_inspectors_layers_have_names(file):
    found = TensorRtEngine(file, RTX, stand_in(), Memory()).describe()
    assert found == [{"Name": "first"}, {"Name": "second", "Precision": "INT8"}]


def test_a_shape_outside_the_profile_says_what_is_inside(file):
    engine = TensorRtEngine(file, RTX, stand_in(), Memory())
    with pytest.raises(UsageError, match=r"'x' of shape \[5, 3\], but \[1, 3\] \.\. \[4, 3\]"):
        engine.run({"x": np.zeros((5, 3))})


def test_an_engine_of_another_version_is_to_be_built_again(file):
    with pytest.raises(ArtefactError, match="Version tag does not match; build it again"):
        TensorRtEngine(file, RTX, stand_in(loads=False), Memory())


def test_a_failing_engine_is_an_error(file):
    engine = TensorRtEngine(file, RTX, stand_in(works=False), Memory())
    with pytest.raises(ArtefactError, match="the engine failed"):
        engine.run({"x": np.zeros((1, 3))})


@pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
def test_without_a_gpu_the_other_way_is_named(file, monkeypatch):
    from trtq.errors import KernelError

    def no_gpu():
        raise KernelError("no GPU can be used: there is no NVIDIA driver on this machine")

    monkeypatch.setattr(running, "Gpu", no_gpu)
    with pytest.raises(UsageError, match=r"no NVIDIA driver.*trtq generate ONNX --provider"):
        open_tensorrt(file, "tensorrt-rtx")


@pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
def test_an_engine_folder_is_a_pipeline(digits_onnx, tmp_path, monkeypatch):
    """Loaded as any other artefact; its denoiser runs what lies in the folder."""
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
    found = inspect(out)
    assert found["engine_layers"] is None
    assert found["engine_layers_missing"] == "no GPU for tensorrt-rtx"
    with pytest.raises(UsageError, match="folder of engines; run it with tensorrt-rtx, not cpu"):
        trtq.load(out, provider="cpu")
