"""Graphs in plugin form: packed operands in the file, and the same integers as in QDQ form."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

import trtq
from trtq.artefact.opened import open_folder
from trtq.engine.ort import OrtEngine
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import ArtefactError
from trtq.exporter.export import export
from trtq.graph.nodes import DOMAIN
from trtq.graph.passes.plugin_nodes import ExpandPlugins
from trtq.graph.runtimes.prepare import load_graph, prepare

needs_rtx = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")


def has_plugins(model):
    return any(node.domain == DOMAIN for node in model.graph)


@pytest.fixture(scope="module")
def plugin_onnx(digits_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("plugin") / "onnx"
    export(digits_run, out, target="plugin")
    return out


def test_every_layer_of_the_digits_model_is_a_plugin(plugin_onnx, digits_onnx):
    model = load_graph(plugin_onnx / "unet" / "model.onnx")
    nodes = [node for node in model.graph if node.domain == "trtq"]
    assert len(nodes) == len(open_folder(plugin_onnx).manifest.layers)
    assert not any(node.op_type in ("QuantizeLinear", "Conv") for node in model.graph)
    assert not has_plugins(load_graph(digits_onnx / "unet" / "model.onnx"))


def test_onnxruntime_runs_plugin_nodes_as_pairs_with_identical_results(plugin_onnx, digits_onnx):
    engines = [OrtEngine(folder / "unet" / "model.onnx") for folder in (plugin_onnx, digits_onnx)]
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((4, 1, 8, 8), np.float32),
        "timestep": np.array([10, 400, 700, 990], np.float32),
        "class_labels": np.array([0, 3, 7, 9]),
    }
    shape = engines[0].inputs["sample"].shape
    feeds["sample"] = rng.standard_normal((4, *shape[1:]), np.float32)
    feeds = {name: feeds[name].astype(spec.dtype) for name, spec in engines[0].inputs.items()}
    plugin, pairs = (next(iter(engine.run(feeds).values())) for engine in engines)
    assert np.array_equal(plugin, pairs)


def test_no_plugin_nodes_remain_after_the_rewrite_to_pairs(plugin_onnx):
    model = prepare(load_graph(plugin_onnx / "unet" / "model.onnx"), "openvino")
    assert not has_plugins(model)
    assert not ExpandPlugins()(model).modified


def test_the_message_names_the_damaged_operand(plugin_onnx):
    model = load_graph(plugin_onnx / "unet" / "model.onnx")
    del model.metadata_props["trtq.timesteps"]
    with pytest.raises(ArtefactError, match="does not specify the timesteps"):
        ExpandPlugins()(model)
    model = load_graph(plugin_onnx / "unet" / "model.onnx")
    node = next(node for node in model.graph if node.domain == "trtq")
    node.attributes["out_channels"] = ir.AttrInt64s("out_channels", [7])
    with pytest.raises(ArtefactError, match=r"attributes say \[7,"):
        ExpandPlugins()(model)


@pytest.mark.slow
@needs_rtx
def test_plugins_are_in_the_engine(plugin_onnx, tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    result = trtq.build(plugin_onnx, tmp_path / "engine", architectures=["sm86", "sm89", "sm120"])
    assert result["architectures"] == ["sm86", "sm89", "sm120"]
    content = (tmp_path / "engine" / "unet" / "model.engine").read_bytes()
    model = prepare(load_graph(plugin_onnx / "unet" / "model.onnx"), "tensorrt-rtx")
    nodes = Counter(node.op_type for node in model.graph if node.domain == "trtq")
    assert nodes["FusedConv2d"] > 0
    for plugin, count in nodes.items():
        assert content.count(plugin.encode()) >= count
    (built,) = [row for row in result["engines"] if row["name"] == "unet"]
    assert built["precisions"] == {"plugin": len(open_folder(plugin_onnx).manifest.layers)}
