"""Unpacking of weights waits for the layer's input, and nothing else changes."""

import numpy as np
import onnx_ir as ir

from trtq.graph.runtimes.delay_weights import DelayWeights
from trtq.graph.runtimes.prepare import load_graph


def unpacked_early(model):
    """Names of the nodes outside of branches that need nothing but constants."""
    early, known = [], set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and all(value.is_initializer() or value in known for value in inputs):
            known |= set(node.outputs)
            early.append(node.name)
    return early


def test_no_large_weight_is_unpacked_before_its_layer_and_the_output_is_the_same(digits_onnx):
    path = digits_onnx / "unet" / "model.onnx"
    model = load_graph(path)
    before = unpacked_early(model)
    weights = [value for value in model.graph.initializers if value.endswith("/weight")]
    assert DelayWeights()(model).modified
    choices = [node for node in model.graph if node.op_type == "If"]
    large = [v for v in weights if model.graph.initializers[v].const_value.nbytes >= 1 << 14]
    assert len(choices) == len(large) > 0
    assert len(before) > len(unpacked_early(model))
    inside = {node.op_type for choice in choices for node in choice.attributes["then_branch"].value}
    assert inside <= {"Cast", "Sub", "DequantizeLinear"}
    assert not DelayWeights()(model).modified


def test_a_graph_without_large_weights_does_not_change():
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.tensor(np.ones((4, 4), np.int8), name="w")
    value = ir.Value(
        name="w", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight
    )
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    product = ir.node("MatMul", [x, cast.outputs[0]])
    graph = ir.Graph(
        [x], product.outputs, nodes=[cast, product], initializers=[value], opset_imports={"": 21}
    )
    assert not DelayWeights()(ir.Model(graph, ir_version=10)).modified
    assert [node.op_type for node in graph] == ["Cast", "MatMul"]
