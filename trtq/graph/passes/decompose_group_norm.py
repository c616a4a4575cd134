"""Decomposes GroupNormalization, with statistics that every runtime rounds to the same value.

1. GroupNormalization becomes Reshape to `[B, groups, rest]`, `(x - mean) * (1 / deviation)` with mean
   and deviation of each group in float64 and the other operations in float32, then Reshape back, Mul by
   the scale and Add of the shift; see `DeployedGroupNorm`.
2. A scale or shift that is not constant is cast to float32 and reshaped in the graph.
3. In half precision, a Cast to float32 precedes these nodes and a Cast back follows them.

onnxruntime has no kernel for GroupNormalization: it inlines the operator's definition, and its OpenVINO
provider then splits the graph and fails. In float32, mean and deviation depend on the order of the
additions, which differs between runtimes; this was the main cause of values on the other side
of a rounding tie. For a runtime without float64 the statistics may be computed in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["DecomposeGroupNorm"]


class DecomposeGroupNorm(ir.passes.InPlacePass):
    """Decompose GroupNormalization, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every GroupNormalization."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "GroupNormalization"]
        for index, node in enumerate(nodes):
            self._rewrite(graph, node, f"group_norm_{index}")
        return ir.passes.PassResult(model, modified=bool(nodes))

    @staticmethod
    def _rewrite(graph: ir.Graph, node: ir.Node, name: str) -> None:
        x, scale, shift = node.inputs
        (out,) = node.outputs
        assert x is not None
        assert x.shape is not None
        assert x.dtype is not None
        assert scale is not None
        assert shift is not None
        groups = node.attributes["num_groups"].as_int()
        build = GraphBuilder(graph, name)
        to_float = {"to": ir.DataType.FLOAT.value}
        half = x.dtype != ir.DataType.FLOAT
        single = build.op("Cast", [x], "wide", to_float) if half else x
        shape = build.constant("grouped_shape", np.array([0, groups, -1], np.int64))
        rows = build.op("Reshape", [single, shape], "grouped")
        last = build.constant("axis", np.array([2], np.int64))
        epsilon = np.array(node.attributes["epsilon"].as_float(), np.float64)

        exact = build.op("Cast", [rows], "exact", {"to": ir.DataType.DOUBLE.value})
        mean = build.op("ReduceMean", [exact, last], "mean", {"keepdims": 1})
        centred = build.op("Sub", [exact, mean], "centred")
        square = build.op("Mul", [centred, centred], "square")
        variance = build.op("ReduceMean", [square, last], "variance", {"keepdims": 1})
        guarded = build.op("Add", [variance, build.constant("epsilon", epsilon)], "guarded")
        deviation = build.op("Sqrt", [guarded], "deviation")
        mean = build.op("Cast", [mean], "mean_float", to_float)
        inverse = build.op("Reciprocal", [deviation], "inverse")
        inverse = build.op("Cast", [inverse], "inverse_float", to_float)

        y = build.op("Mul", [build.op("Sub", [rows, mean], "moved"), inverse], "normalized")
        y = build.op("Reshape", [y, build.op("Shape", [x], "shape")], "ungrouped")
        channel = (-1, *(1,) * (len(x.shape) - 2))
        for operator, key, value in (("Mul", "scale", scale), ("Add", "shift", shift)):
            if value.const_value is not None:
                data = value.const_value.numpy().astype(np.float32).reshape(channel)
                factor = build.constant(key, data)
            else:
                factor = build.op("Cast", [value], f"{key}_float", to_float)
                columns = build.constant("channel", np.array(channel, np.int64))
                factor = build.op("Reshape", [factor, columns], key)
            y = build.op(operator, [y, factor], f"{key}_applied")
        if half:
            y = build.op("Cast", [y], "narrow", {"to": x.dtype.value})
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
