"""GroupNormalization spelled out, with statistics that every runtime rounds alike."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["DecomposeGroupNorm"]


class DecomposeGroupNorm(ir.passes.InPlacePass):
    """Mean and deviation of each group in float64, the rest in float32; see `DeployedGroupNorm`.

    onnxruntime has no kernel for GroupNormalization: it inlines the operator's definition, and its
    OpenVINO provider then splits the graph and fails. Summed in float32, mean and deviation depend on
    the order of the additions, which is each runtime's own; that was the largest source of values
    landing on the other side of a rounding tie. A runtime without float64 may read it as float32.
    """

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
        assert scale.const_value is not None
        assert shift is not None
        assert shift.const_value is not None
        groups = node.attributes["num_groups"].as_int()
        build = GraphBuilder(graph, name)
        to_float = {"to": ir.DataType.FLOAT.value}
        half = x.dtype != ir.DataType.FLOAT
        wide = build.op("Cast", [x], "wide", to_float) if half else x
        shape = build.constant("grouped_shape", np.array([0, groups, -1], np.int64))
        rows = build.op("Reshape", [wide, shape], "grouped")
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
        for operator, key, stored in (
            ("Mul", "scale", scale.const_value),
            ("Add", "shift", shift.const_value),
        ):
            data = stored.numpy().astype(np.float32).reshape(channel)
            y = build.op(operator, [y, build.constant(key, data)], f"{key}_applied")
        if half:
            y = build.op("Cast", [y], "narrow", {"to": x.dtype.value})
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
