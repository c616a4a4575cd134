"""Replaces Where of booleans, for which onnxruntime has no kernel, by logical operators.

1. `Where(c, x, y)` of booleans becomes `Or(And(c, x), And(Not(c), y))`.
"""

from __future__ import annotations

import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["BooleanWhere"]


class BooleanWhere(ir.passes.InPlacePass):
    """Replace Where of booleans, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Where that chooses between booleans."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Where" and _chooses_booleans(node)]
        for index, node in enumerate(nodes):
            build = GraphBuilder(graph, f"where_{index}")
            condition, x, y = node.inputs
            (out,) = node.outputs
            taken = build.op("And", [condition, x], "taken")
            other = build.op("And", [build.op("Not", [condition], "otherwise"), y], "other")
            result = build.op("Or", [taken, other], "chosen")
            result.shape, result.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], build.nodes, [out], [result]
            )
        return ir.passes.PassResult(model, modified=bool(nodes))


def _chooses_booleans(node: ir.Node) -> bool:
    values = (*node.inputs[1:], *node.outputs)
    return any(value is not None and value.dtype == ir.DataType.BOOL for value in values)
