"""GroupNormalization in terms of InstanceNormalization, which every runtime has a kernel for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.export.passes.builder import GraphBuilder

__all__ = ["SpellOutGroupNorm"]


class SpellOutGroupNorm(ir.passes.InPlacePass):
    """Reshape to one instance per group, normalise, reshape back, scale and shift; in float32.

    onnxruntime has no kernel for GroupNormalization: it inlines the operator's definition, a dozen
    nodes each, and its OpenVINO provider then splits the graph and fails.
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
        assert x is not None and x.shape is not None and x.dtype is not None
        assert scale is not None and scale.const_value is not None
        assert shift is not None and shift.const_value is not None
        groups = node.attributes["num_groups"].as_int()
        build = GraphBuilder(graph, name)
        # Sums over a group overflow half precision.
        half = x.dtype != ir.DataType.FLOAT
        wide = build.op("Cast", [x], "wide", {"to": ir.DataType.FLOAT.value}) if half else x
        rows = build.constant("rows", np.array([0, groups, -1], np.int64))
        operands = [
            build.op("Reshape", [wide, rows], "grouped"),
            build.constant("ones", np.ones(groups, np.float32)),
            build.constant("zeros", np.zeros(groups, np.float32)),
        ]
        epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
        normal = build.op("InstanceNormalization", operands, "normalized", epsilon)
        y = build.op("Reshape", [normal, build.op("Shape", [x], "shape")], "ungrouped")
        channel = (-1, *(1,) * (len(x.shape) - 2))
        for operator, key, value in (("Mul", "scale", scale), ("Add", "shift", shift)):
            data = value.const_value.numpy().astype(np.float32).reshape(channel)
            y = build.op(operator, [y, build.constant(key, data)], f"{key}_applied")
        if half:
            y = build.op("Cast", [y], "narrow", {"to": x.dtype.value})
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
