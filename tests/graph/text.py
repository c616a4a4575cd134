"""Graphs in ONNX's text format."""

import onnx
import onnx_ir as ir
import onnxruntime

HEAD = '<ir_version: 10, opset_import: ["" : 21, "trtq" : 1]>'


def parse(body, **initializers):
    proto = onnx.parser.parse_model(f"{HEAD}\n{body}")
    for name, array in initializers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model, **feeds):
    """Run a graph without onnxruntime's own rewrites, which in version 1.24 turn transposed int8
    weights into zeros."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def operators(model):
    return [node.op_type for node in model.graph]
