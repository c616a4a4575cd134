"""Options of onnxruntime's TensorRT providers; the providers themselves need a GPU."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from trtq.artefact.opened import open_folder
from trtq.engine import ort_tensorrt
from trtq.engine.ort import OWN_PACKAGES, PROVIDERS, OrtSession
from trtq.engine.ort_tensorrt import provider_settings
from trtq.engine.profile import exported_profile
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import DATA_NAME
from trtq.pipelines.open import open_any

PROFILE = {"sample": ([1, 4, 8, 8], [2, 4, 8, 8], [16, 4, 8, 8]), "timestep": ([1], [2], [16])}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("provider", "short"), [("tensorrt", "trt"), ("tensorrt-rtx", "nv")])
def test_ranges_are_written_in_the_format_of_the_provider(provider, short, tmp_path):
    settings = provider_settings(provider, PROFILE, "key")
    assert settings[f"{short}_profile_min_shapes"] == "sample:1x4x8x8,timestep:1"
    assert settings[f"{short}_profile_opt_shapes"] == "sample:2x4x8x8,timestep:2"
    assert settings[f"{short}_profile_max_shapes"] == "sample:16x4x8x8,timestep:16"
    assert str(tmp_path / "cache" / "onnxruntime" / "key") in settings.values()


class Session:
    """A session whose CUDA graphs, as in onnxruntime's TensorRT providers, are captured once and then
    replayed on the addresses of the first call, even if the caller's arrays have moved."""

    def __init__(self, model, options, providers=None):
        (chosen,) = providers
        self.provider, self.settings = chosen
        self.captured = None

    def disable_fallback(self):
        pass

    def get_providers(self):
        return [self.provider]

    def get_inputs(self):
        return []

    def get_outputs(self):
        return [SimpleNamespace(name="y", type="tensor(float)", shape=[3])]

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={})

    def run(self, names, feeds):
        on = [key for key, value in self.settings.items() if "cuda_graph" in key and value != "0"]
        if self.captured is None or not on:
            self.captured = feeds["x"].copy()
        return [self.captured + 1]


def open_with(runtime_session, graph, provider, monkeypatch):
    runtime = SimpleNamespace(
        __version__="1.24.1",
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *_: None),
        InferenceSession=runtime_session,
        get_available_providers=lambda: list(PROVIDERS.values()),
    )
    monkeypatch.setattr(ort_tensorrt, "require", lambda _: runtime)
    monkeypatch.setattr("trtq.engine.ort.require", lambda _: runtime)
    return ort_tensorrt.OrtTensorRtEngine(graph, provider, PROFILE)


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_every_call_computes_its_own_input(digits_onnx, provider, monkeypatch):
    """A captured graph would return the result of the first call every time."""
    engine = open_with(Session, digits_onnx / "unet" / "model.onnx", provider, monkeypatch)
    for value in range(4):
        x = np.full(3, value, np.float32)
        assert np.array_equal(engine.run({"x": x})["y"], x + 1)


def test_a_failing_session_raises_one_error():
    class Failing(Session):
        def run(self, names, feeds):
            raise RuntimeError(
                "Failed to allocate memory for requested buffer of size 9\nMore of it"
            )

    engine = OrtSession(Failing("", None, [("CUDAExecutionProvider", {})]), "cuda")
    with pytest.raises(ArtefactError, match=r"on cuda: Failed to allocate.*a smaller batch") as e:
        engine.run({})
    assert "\n" not in str(e.value)


def test_models_of_one_shape_have_separate_engines(digits_onnx, tmp_path, monkeypatch):
    """The provider names cached engines after the graph's nodes, which are the same in both models.

    For `tensorrt` see `tests/engine/test_ort_context.py`.
    """
    places = []

    def session(model, options, providers):
        ((_, settings),) = providers
        places.append(next(v for k, v in settings.items() if k.endswith("cache_path")))
        return Session(model, options, providers)

    shutil.copytree(digits_onnx / "unet", tmp_path / "same")
    shutil.copytree(digits_onnx / "unet", tmp_path / "tuned")
    data = tmp_path / "tuned" / DATA_NAME
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    for folder in (digits_onnx / "unet", tmp_path / "same", tmp_path / "tuned"):
        open_with(session, folder / "model.onnx", "tensorrt-rtx", monkeypatch)
    assert places[0] == places[1] != places[2]


def test_without_a_cache_engines_are_not_kept(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "file"))
    for provider in ("tensorrt", "tensorrt-rtx"):
        assert not [k for k in provider_settings(provider, PROFILE, "key") if "cache" in k]
    assert "engines of onnxruntime are not kept" in caplog.text


def test_ranges_come_from_the_export(digits_onnx):
    profile = exported_profile(digits_onnx, "unet", open_folder(digits_onnx).manifest)
    assert profile["sample"][0][0] == 1
    assert profile["sample"][2][0] == 8
    assert set(profile) == {"sample", "timestep", "class_labels"}


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_the_error_about_a_missing_provider_names_its_packages(digits_onnx, provider, monkeypatch):
    monkeypatch.setitem(sys.modules, OWN_PACKAGES["tensorrt-rtx"], None)
    package = "onnxruntime-gpu" if provider == "tensorrt" else "onnxruntime-ep-nv-tensorrt-rtx"
    with pytest.raises(UsageError, match=f"no provider '{provider}'.*{package}"):
        open_any(digits_onnx, provider)


def test_the_providers_own_package_registers_itself(monkeypatch):
    """With a fake package: a GPU becomes a device of the session; without a GPU an error is raised."""
    registered, added = [], []
    package = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: "nv.so")
    monkeypatch.setitem(sys.modules, OWN_PACKAGES["tensorrt-rtx"], package)
    devices = [SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")]
    monkeypatch.setattr(ort_tensorrt, "_registered", set())

    def register(*names):
        if names in registered:
            raise RuntimeError("library is already registered under Nv")
        registered.append(names)

    runtime = SimpleNamespace(
        register_execution_provider_library=register,
        get_ep_devices=lambda: devices,
    )
    monkeypatch.setattr(ort_tensorrt, "require", lambda _: runtime)
    options = SimpleNamespace(add_provider_for_devices=lambda *given: added.append(given))
    # A pipeline has several graphs, and onnxruntime accepts a library once.
    for _ in range(2):
        ort_tensorrt._add_plugin(options, "tensorrt-rtx", {"key": "value"})
    assert registered == [("Nv", "nv.so")]
    assert added == [(devices, {"key": "value"})] * 2
    devices.clear()
    with pytest.raises(UsageError, match="finds no NVIDIA GPU"):
        ort_tensorrt._add_plugin(options, "tensorrt-rtx", {})
