"""Options of onnxruntime's TensorRT providers; the providers themselves need a GPU."""

import sys
from types import SimpleNamespace

import pytest

from trtq.engine import ort_tensorrt
from trtq.engine.ort import OWN_PACKAGES
from trtq.engine.ort_tensorrt import provider_settings
from trtq.errors import UsageError
from trtq.manifest import read_manifest
from trtq.stages.build import exported_profile
from trtq.stages.load import open_any

PROFILE = {"sample": ([1, 4, 8, 8], [2, 4, 8, 8], [16, 4, 8, 8]), "timestep": ([1], [2], [16])}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("provider", "short", "graphs"),
    [("tensorrt", "trt", "trt_cuda_graph_enable"), ("tensorrt-rtx", "nv", "enable_cuda_graph")],
)
def test_ranges_are_written_as_the_provider_reads_them(provider, short, graphs, tmp_path):
    found = provider_settings(provider, PROFILE)
    assert found[f"{short}_profile_min_shapes"] == "sample:1x4x8x8,timestep:1"
    assert found[f"{short}_profile_opt_shapes"] == "sample:2x4x8x8,timestep:2"
    assert found[f"{short}_profile_max_shapes"] == "sample:16x4x8x8,timestep:16"
    assert found[graphs] == "1"
    assert str(tmp_path / "cache" / "onnxruntime") in found.values()


def test_ranges_come_from_the_export(digits_onnx):
    profile = exported_profile(digits_onnx, "unet", read_manifest(digits_onnx))
    assert profile["sample"][0][0] == 1
    assert profile["sample"][2][0] == 8
    assert set(profile) == {"sample", "timestep", "class_labels"}


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_without_the_provider_its_packages_are_named(digits_onnx, provider, monkeypatch):
    monkeypatch.setitem(sys.modules, OWN_PACKAGES["tensorrt-rtx"], None)
    package = "onnxruntime-gpu" if provider == "tensorrt" else "onnxruntime-ep-nv-tensorrt-rtx"
    with pytest.raises(UsageError, match=f"no provider '{provider}'.*{package}"):
        open_any(digits_onnx, provider)


def test_the_providers_own_package_registers_itself(monkeypatch):
    """Against a stand-in: with a GPU its device joins the session, without one that is said."""
    registered, added = [], []
    package = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: "nv.so")
    monkeypatch.setitem(sys.modules, OWN_PACKAGES["tensorrt-rtx"], package)
    devices = [SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")]
    runtime = SimpleNamespace(
        register_execution_provider_library=lambda *names: registered.append(names),
        get_ep_devices=lambda: devices,
    )
    monkeypatch.setattr(ort_tensorrt, "require", lambda _: runtime)
    options = SimpleNamespace(add_provider_for_devices=lambda *given: added.append(given))
    ort_tensorrt._add_plugin(options, "tensorrt-rtx", {"key": "value"})
    assert registered == [("Nv", "nv.so")]
    assert added == [(devices, {"key": "value"})]
    devices.clear()
    with pytest.raises(UsageError, match="sees no NVIDIA GPU"):
        ort_tensorrt._add_plugin(options, "tensorrt-rtx", {})
