"""Computes LayerNormalization in float64, so that every runtime rounds it to the same value.

1. `LayerNormalization(x)` becomes Cast to float64, LayerNormalization in float64, Cast back; see
   `DeployedLayerNorm`. Constant scales and shifts become float64 constants, others get a Cast.

In float32, versions of onnxruntime differ in the last bit (1.24 and 1.31 do), which sometimes puts a
value on the other side of a rounding tie. For a runtime without float64 the norm may be computed in
float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["CastLayerNormToFloat64"]


class CastLayerNormToFloat64(ir.passes.InPlacePass):
    """Cast LayerNormalization to float64, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every LayerNormalization that is not in float64."""
        graph = model.graph
        nodes = [
            node
            for node in graph
            if node.op_type == "LayerNormalization" and not _exact(node.inputs[0])
        ]
        for index, node in enumerate(nodes):
            self._rewrite(graph, node, f"layer_norm_{index}")
        return ir.passes.PassResult(model, modified=bool(nodes))

    @staticmethod
    def _rewrite(graph: ir.Graph, node: ir.Node, name: str) -> None:
        (x, *affine), out = node.inputs, node.outputs[0]
        assert x is not None
        assert x.dtype is not None
        build = GraphBuilder(graph, name)
        to_double = {"to": ir.DataType.DOUBLE.value}
        inputs = [build.op("Cast", [x], "exact", to_double)]
        for key, value in zip(("scale", "shift"), affine, strict=False):
            if value is None:
                continue
            if value.const_value is None:
                inputs.append(build.op("Cast", [value], f"{key}_exact", to_double))
            else:
                data = value.const_value.numpy().astype(np.float64)
                inputs.append(build.constant(key, data))
        y = build.op("LayerNormalization", inputs, "normalized", dict(node.attributes))
        y.type = ir.TensorType(ir.DataType.DOUBLE)
        y = build.op("Cast", [y], "rounded", {"to": x.dtype.value})
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])


def _exact(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    to = producer.attributes.get("to") if producer is not None else None
    return to is not None and to.as_int() == ir.DataType.DOUBLE.value
