"""Fuses decomposed group statistics into one operator, for compilers with a kernel for it.

1. The nodes `Reshape -> (x - mean) * (1 / deviation)` of `DecomposeGroupNorm`, with statistics in
   float64, become `Reshape -> InstanceNormalization`.

With groups as channels the operator computes the same normalisation, in float32 and in one pass over the
values. Unlike GroupNormalization it reaches OpenVINO through onnxruntime, see `DecomposeGroupNorm`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["FuseGroupNorm"]


class FuseGroupNorm(ir.passes.InPlacePass):
    """Replace decomposed group statistics by InstanceNormalization, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on `(x - mean) * inverse` with the statistics in float64."""
        graph = model.graph
        modified = False
        for index, node in enumerate([n for n in graph if n.op_type == "Mul"]):
            match = self._match(node)
            if match is None:
                continue
            rows, groups, epsilon = match
            build = GraphBuilder(graph, f"fused_norm_{index}")
            ones = build.constant("scale", np.ones(groups, np.float32))
            zeros = build.constant("shift", np.zeros(groups, np.float32))
            attributes = {"epsilon": epsilon}
            y = build.op("InstanceNormalization", [rows, ones, zeros], "normalized", attributes)
            (out,) = node.outputs
            y.shape, y.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _match(node: ir.Node) -> tuple[ir.Value, int, float] | None:
        """The `(rows, groups, epsilon)` of a normalisation that ends with a product; None: no match."""
        moved, inverse = (_producer(value, None) for value in node.inputs)
        if moved is None or inverse is None or (moved.op_type, inverse.op_type) != ("Sub", "Cast"):
            return None
        guarded = inverse
        for operator in ("Reciprocal", "Sqrt", "Add"):
            before = _producer(guarded.inputs[0], operator)
            if before is None:
                return None
            guarded = before
        rows = moved.inputs[0]
        mean = _producer(moved.inputs[1], "Cast")
        mean = _producer(mean.inputs[0], "ReduceMean") if mean is not None else None
        exact = _producer(mean.inputs[0], "Cast") if mean is not None else None
        epsilon = guarded.inputs[1].const_value if guarded.inputs[1] is not None else None
        reshape = _producer(rows, "Reshape")
        shape = reshape.inputs[1].const_value if reshape is not None and reshape.inputs[1] else None
        if exact is None or exact.inputs[0] is not rows or epsilon is None or shape is None:
            return None
        assert rows is not None
        return rows, int(shape.numpy()[1]), float(epsilon.numpy())


def _producer(value: ir.Value | None, operator: str | None) -> ir.Node | None:
    """The node that computes a value if its type is `operator` (None: any type), else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and operator in (None, node.op_type) else None
