"""Sine and cosine of float64, which onnxruntime does not have, in float32."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from trtq.export.passes.builder import GraphBuilder

__all__ = ["NarrowAngles"]


class NarrowAngles(ir.passes.InPlacePass):
    """Bring an angle into -pi .. pi in float64 first, and take its sine or cosine in float32.

    Rotary positions are computed in float64 because an angle of some thousand radians has no digits left
    in float32. Within one turn it has all of them: the result is right to 3e-7.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Sin and Cos of float64."""
        graph = model.graph
        chosen = [
            node
            for node in graph
            if node.op_type in ("Sin", "Cos")
            and node.inputs[0] is not None
            and node.inputs[0].dtype == ir.DataType.DOUBLE
        ]
        for index, node in enumerate(chosen):
            (angle,), (out,) = node.inputs, node.outputs
            assert angle is not None
            build = GraphBuilder(graph, f"angle_{index}")
            turn = build.constant("turn", np.array(2 * math.pi))
            turns = build.op("Round", [build.op("Div", [angle, turn], "turns")], "whole_turns")
            rest = build.op("Sub", [angle, build.op("Mul", [turns, turn], "passed")], "rest")
            narrow = build.op("Cast", [rest], "narrow", {"to": ir.DataType.FLOAT.value})
            found = build.op(node.op_type, [narrow], "found")
            wide = build.op("Cast", [found], "wide", {"to": ir.DataType.DOUBLE.value})
            wide.shape, wide.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [wide])
        return ir.passes.PassResult(model, modified=bool(chosen))
