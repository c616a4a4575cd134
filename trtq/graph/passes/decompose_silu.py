"""`x * sigmoid(x)` as `x / (1 + exp(-x))`, the way torch computes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["DecomposeSilu"]


class DecomposeSilu(ir.passes.InPlacePass):
    """Replace Mul(x, Sigmoid(x)).

    onnxruntime's Sigmoid is an approximation that differs from torch in half of all values, by an ulp;
    this form differs in a twentieth. In front of a quantiser each difference is a chance to land on
    the other side of a rounding tie. Compilers fuse both forms.

    Vectors `[B,N]` are embeddings of the time or of classes. They are few, and one code of them that
    flips moves all images of a step, so they are computed in float64 and rounded, where nothing differs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Mul of a value with its own Sigmoid, in float32."""
        graph = model.graph
        modified = False
        for index, node in enumerate([n for n in graph if n.op_type == "Mul"]):
            x = self._silu_input(node)
            if x is None:
                continue
            build = GraphBuilder(graph, f"silu_{index}")
            exact = x.shape is not None and len(x.shape) == 2
            one = build.constant("one", np.array(1.0, np.float64 if exact else np.float32))
            double, single = (
                {"to": kind.value} for kind in (ir.DataType.DOUBLE, ir.DataType.FLOAT)
            )
            gated = build.op("Cast", [x], "wide", double) if exact else x
            exponential = build.op("Exp", [build.op("Neg", [gated], "negated")], "exponential")
            below = build.op("Add", [exponential, one], "denominator")
            y = build.op("Div", [gated, below], "silu")
            if exact:
                y = build.op("Cast", [y], "narrow", single)
            (out,) = node.outputs
            y.shape, y.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            modified = True
        if modified:
            for node in [n for n in graph if n.op_type == "Sigmoid"]:
                if not node.outputs[0].uses():
                    graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _silu_input(node: ir.Node) -> ir.Value | None:
        first, second = node.inputs
        for x, gate in ((first, second), (second, first)):
            producer = gate.producer() if gate is not None else None
            if producer is None or producer.op_type != "Sigmoid" or producer.inputs[0] is not x:
                continue
            if x is not None and x.dtype == ir.DataType.FLOAT:
                return x
        return None
