"""Computes sine and cosine as polynomials in float64.

1. Sin and Cos of float64 become nodes that subtract whole turns, so that the angle lies in -pi .. pi,
   and sum the Taylor series, which is accurate to 1e-13.
2. Sin and Cos of float32 become the same nodes between a Cast to float64 and a Cast back.

The sines of runtimes differ from torch in the last bit. A time embedding is the same for all images of a
step, so one of its values on a rounding tie would change every image. Rounded from float64, the results
are the same everywhere; the deployed torch model computes its sines in float64 too. onnxruntime does not
support Sin of float64, which rotary positions need.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["DecomposeTimestepEmbedding"]

_TERMS = 13
_TURN_HIGH = 6.28125
"""2 pi rounded to eight bits, so that its whole multiples are exact even in float32."""
_TURN_LOW = 2 * math.pi - _TURN_HIGH


class DecomposeTimestepEmbedding(ir.passes.InPlacePass):
    """Replace Sin and Cos, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Sin and Cos of float32 and float64."""
        graph = model.graph
        chosen = [
            node
            for node in graph
            if node.op_type in ("Sin", "Cos")
            and node.inputs[0] is not None
            and node.inputs[0].dtype in (ir.DataType.DOUBLE, ir.DataType.FLOAT)
        ]
        for index, node in enumerate(chosen):
            self._rewrite(graph, node, f"angle_{index}")
        return ir.passes.PassResult(model, modified=bool(chosen))

    @staticmethod
    def _rewrite(graph: ir.Graph, node: ir.Node, name: str) -> None:
        (angle,), (out,) = node.inputs, node.outputs
        assert angle is not None
        build = GraphBuilder(graph, name)
        is_double = angle.dtype == ir.DataType.DOUBLE
        x = (
            angle
            if is_double
            else build.op("Cast", [angle], "wide", {"to": ir.DataType.DOUBLE.value})
        )

        def number(key: str, value: float) -> ir.Value:
            return build.constant(key, np.array(value))

        turns = build.op("Div", [x, number("turn", 2 * math.pi)], "turns")
        turns = build.op("Round", [turns], "whole_turns")
        for part, value in (("high", _TURN_HIGH), ("low", _TURN_LOW)):
            passed = build.op("Mul", [turns, number(part, value)], f"passed_{part}")
            x = build.op("Sub", [x, passed], f"rest_{part}")
        square = build.op("Mul", [x, x], "square")
        # Horner from the smallest term: sin = x (1 - x^2/3! + ...), cos = 1 - x^2/2! + ...
        odd = node.op_type == "Sin"
        terms = [(-1) ** k / math.factorial(2 * k + odd) for k in range(_TERMS)]
        total = number(f"term_{_TERMS - 1}", terms[-1])
        for k in reversed(range(_TERMS - 1)):
            grown = build.op("Mul", [total, square], f"grown_{k}")
            total = build.op("Add", [grown, number(f"term_{k}", terms[k])], f"sum_{k}")
        if odd:
            total = build.op("Mul", [total, x], "sine")
        if not is_double:
            total = build.op("Cast", [total], "narrow", {"to": ir.DataType.FLOAT.value})
        total.shape, total.type = out.shape, out.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [total])
