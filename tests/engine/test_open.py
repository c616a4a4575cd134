"""Graphs that are refused before a runtime opens them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from trtq.engine.open import open_engine
from trtq.errors import ArtefactError


def graph(*nodes):
    value = helper.make_tensor_value_info
    constants = [numpy_helper.from_array(np.array(True), "true")]
    ends = [[value(name, TensorProto.FLOAT, [1])] for name in ("x", "y")]
    made = helper.make_graph(list(nodes), "g", *ends, initializer=constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def endless():
    value = helper.make_tensor_value_info
    inputs = [
        value("i", TensorProto.INT64, []),
        value("go", TensorProto.BOOL, []),
        value("in", TensorProto.FLOAT, [1]),
    ]
    outputs = [value("on", TensorProto.BOOL, []), value("out", TensorProto.FLOAT, [1])]
    nodes = [
        helper.make_node("Identity", ["go"], ["on"]),
        helper.make_node("Identity", ["in"], ["out"]),
    ]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_graph_with_a_loop_is_refused_before_it_is_opened(provider, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(endless()).SerializeToString())
    with pytest.raises(ArtefactError, match="holds a Loop, which may never end"):
        open_engine(path, provider)


def test_a_node_whose_name_is_loop_is_accepted(tmp_path):
    path = tmp_path / "model.onnx"
    node = helper.make_node("Identity", ["x"], ["y"], name="Loop")
    path.write_bytes(graph(node).SerializeToString())
    engine = open_engine(path)
    assert engine.run({"x": np.ones(1, np.float32)})["y"] == 1
