"""Computes SiLU in the same way as torch.

1. `Mul(x, Sigmoid(x))` in float32 becomes `x / (1 + exp(-x))`.
2. If x is `[B, N]`, an embedding of the time or of classes, the formula is computed in float64 and cast
   back.
3. A Sigmoid that has no other use is removed.

onnxruntime's Sigmoid is an approximation that differs from torch in half of all values, by an ulp; the
formula differs in a twentieth of them. In front of a quantiser each difference may put a value on the
other side of a rounding tie. Compilers fuse both forms. An embedding has few values, and a flipped code
in it changes all images of a step, so rule 2 makes embeddings equal to the last bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["DecomposeSilu"]


class DecomposeSilu(ir.passes.InPlacePass):
    """Replace `Mul(x, Sigmoid(x))`, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Mul of a float32 value and its Sigmoid."""
        graph = model.graph
        modified = False
        for index, node in enumerate([n for n in graph if n.op_type == "Mul"]):
            x = self._silu_input(node)
            if x is None:
                continue
            self._rewrite(graph, node, x, f"silu_{index}")
            modified = True
        if modified:
            for node in [n for n in graph if n.op_type == "Sigmoid"]:
                if not node.outputs[0].uses():
                    graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _rewrite(graph: ir.Graph, node: ir.Node, x: ir.Value, name: str) -> None:
        build = GraphBuilder(graph, name)
        exact = x.shape is not None and len(x.shape) == 2
        unit = build.constant("one", np.array(1.0, np.float64 if exact else np.float32))
        double, single = ({"to": kind.value} for kind in (ir.DataType.DOUBLE, ir.DataType.FLOAT))
        gated = build.op("Cast", [x], "wide", double) if exact else x
        exponential = build.op("Exp", [build.op("Neg", [gated], "negated")], "exponential")
        denominator = build.op("Add", [exponential, unit], "denominator")
        y = build.op("Div", [gated, denominator], "silu")
        if exact:
            y = build.op("Cast", [y], "narrow", single)
        (out,) = node.outputs
        y.shape, y.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])

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
