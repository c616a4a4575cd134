"""Compiled engines of onnxruntime's providers that are kept from start to start.

The TensorRT providers need a GPU: a stand-in writes what they write. The session options are also given
to onnxruntime itself, whose OpenVINO provider writes context files, too.
"""

import shutil
from types import SimpleNamespace

import pytest

from tests.engine.test_ort_tensorrt import PROFILE, Session
from trtq.engine import ort_context, ort_tensorrt
from trtq.engine.ort import PROVIDERS
from trtq.errors import ArtefactError
from trtq.resources import cache_folder

KINDS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))


class Options:
    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, name, value):
        assert name not in self.entries
        self.entries[name] = value


class Runtime:
    """A stand-in for onnxruntime that notes how each session was opened."""

    def __init__(self, version="1.24.1"):
        self.__version__ = version
        self.SessionOptions = Options
        self.opened, self.settings, self.broken = [], [], False

    def get_available_providers(self):
        return list(PROVIDERS.values())

    def InferenceSession(self, model, options, providers):
        ((_, settings),) = providers
        self.settings.append(settings)
        kept = isinstance(model, str)
        self.opened.append("kept" if kept else "compiled")
        if kept and self.broken:
            raise RuntimeError("the engine plan file is not compatible with this version")
        file = options.entries.get("ep.context_file_path")
        if file is not None:
            assert options.entries["ep.context_enable"] == "1"
            assert options.entries["ep.context_embed_mode"] == "0"
            folder = ort_context.Path(file).parent
            (folder / "model_engine.bin").write_bytes(b"engine")
            ort_context.Path(file).write_bytes(b"context")
        session = Session(model, options, providers)
        names = {} if kept else {"trtq.timesteps": "[1.0]"}
        session.get_modelmeta = lambda: SimpleNamespace(custom_metadata_map=names)
        return session


@pytest.fixture
def start(digits_onnx, monkeypatch):
    """A function that opens the digits' graph, as a start of a server does."""

    def opened(runtime, provider="tensorrt-rtx", graph=None, profile=PROFILE):
        monkeypatch.setattr(ort_tensorrt, "require", lambda _: runtime)
        monkeypatch.setattr("trtq.engine.ort.require", lambda _: runtime)
        path = (graph or digits_onnx / "unet") / "model.onnx"
        return ort_tensorrt.OrtTensorRtEngine(path, provider, profile)

    return opened


def folders():
    return sorted(cache_folder("onnxruntime-engines").iterdir())


@pytest.mark.parametrize("provider", KINDS)
def test_the_second_start_loads_the_engine(provider, start):
    runtime = Runtime()
    first, second = start(runtime, provider), start(runtime, provider)
    assert runtime.opened == ["compiled", "kept"]
    # The context file has lost the metadata of the graph.
    assert first.metadata == second.metadata == {"trtq.timesteps": "[1.0]"}
    (folder,) = folders()
    assert {file.name for file in folder.iterdir()} == {
        "model.onnx",
        "model_engine.bin",
        "files.json",
    }
    # TensorRT's provider writes next to the context file, and refuses another folder.
    absolute = [s for s in runtime.settings if s.get("trt_engine_cache_path")]
    assert not absolute


def changed_graph(digits_onnx, tmp_path):
    folder = shutil.copytree(digits_onnx / "unet", tmp_path / "tuned")
    data = folder / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    return folder


@pytest.mark.parametrize("change", ["weights", "shapes", "version", "gpu", "provider"])
@pytest.mark.parametrize("provider", KINDS)
def test_an_engine_of_something_else_is_not_loaded(
    provider, change, start, digits_onnx, tmp_path, monkeypatch
):
    start(Runtime(), provider)
    runtime, options = Runtime(), {"provider": provider}
    if change == "weights":
        options["graph"] = changed_graph(digits_onnx, tmp_path)
    elif change == "shapes":
        options["profile"] = PROFILE | {"timestep": ([1], [4], [16])}
    elif change == "version":
        runtime = Runtime("1.25.0")
    elif change == "gpu":
        monkeypatch.setattr(ort_tensorrt, "first_gpu_text", lambda: "RTX 5090, sm120")
    else:
        options["provider"] = next(kind for kind in KINDS if kind != provider)
    start(runtime, **options)
    assert runtime.opened == ["compiled"]
    assert len(folders()) == 2


@pytest.mark.parametrize("damage", ["cut", "missing", "added", "listing", "writable"])
def test_a_damaged_engine_is_compiled_again(damage, start):
    start(Runtime())
    (folder,) = folders()
    engine = folder / "model_engine.bin"
    if damage == "cut":
        engine.write_bytes(b"eng")
    elif damage == "missing":
        engine.unlink()
    elif damage == "added":
        (folder / "other.bin").write_bytes(b"x")
    elif damage == "listing":
        (folder / "files.json").write_text("[]")
    else:
        folder.chmod(0o777)
    runtime = Runtime()
    start(runtime)
    start(runtime)
    assert runtime.opened == ["compiled", "kept"]
    assert len(folders()) == 1


def test_an_engine_that_cannot_be_loaded_is_compiled_again(start, caplog):
    start(Runtime())
    runtime = Runtime()
    runtime.broken = True
    start(runtime)
    assert runtime.opened == ["kept", "compiled"]
    assert "is compiled again: onnxruntime cannot load" in caplog.text
    runtime.broken = False
    start(runtime)
    assert runtime.opened[2:] == ["kept"]


def test_nothing_half_written_is_left(start, monkeypatch, caplog):
    runtime = Runtime()
    opened = runtime.InferenceSession

    def no_contexts(model, options, providers):
        if "ep.context_enable" in options.entries:
            opened(model, options, providers)
            raise RuntimeError("the provider cannot write a context")
        return opened(model, options, providers)

    runtime.InferenceSession = no_contexts
    engine = start(runtime)
    assert engine.metadata == {"trtq.timesteps": "[1.0]"}
    assert "compiled without being kept" in caplog.text
    assert folders() == []

    def interrupted(model, options, providers):
        opened(model, options, providers)
        raise KeyboardInterrupt

    runtime.InferenceSession = interrupted
    with pytest.raises(KeyboardInterrupt):
        start(runtime)
    assert folders() == []


def test_a_graph_that_cannot_be_compiled_is_an_error(start):
    runtime = Runtime()

    def failing(model, options, providers):
        raise RuntimeError("out of memory")

    runtime.InferenceSession = failing
    with pytest.raises(ArtefactError, match="onnxruntime cannot load"):
        start(runtime)
    assert folders() == []


def test_without_a_cache_nothing_is_kept(start, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "file"))
    runtime = Runtime()
    start(runtime)
    start(runtime)
    assert runtime.opened == ["compiled", "compiled"]


def test_old_engines_are_removed(start, monkeypatch):
    monkeypatch.setattr(ort_context, "_MAX_ENGINES", 2)
    for version in ("1", "2", "3"):
        start(Runtime(version))
    assert len(folders()) == 2


def test_onnxruntime_knows_the_options(digits_onnx, tmp_path):
    """OpenVINO's provider writes its engine next to the file, by a name relative to the file."""
    import onnx

    from trtq.engine.openvino import OpenVinoEngine
    from trtq.engine.ort import open_serialized, session_options
    from trtq.engine.prepared import prepared_graph

    path = digits_onnx / "unet" / "model.onnx"
    graph = prepared_graph(path, OpenVinoEngine.provider)
    options = session_options(1)
    for name, value in ort_context.context_options(tmp_path / "model.onnx").items():
        options.add_session_config_entry(name, value)
    settings = {"device_type": "CPU", "precision": "FP32"}
    open_serialized(path, graph.model, options, "openvino", settings)
    (node,) = onnx.load(tmp_path / "model.onnx").graph.node
    assert node.op_type == "EPContext"
    attributes = {attribute.name: attribute for attribute in node.attribute}
    assert (tmp_path / attributes["ep_cache_context"].s.decode()).is_file()
    assert attributes["embed_mode"].i == 0
