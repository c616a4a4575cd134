"""Makes the scales of a weight unequal, for OpenVINO's integer convolutions without VNNI.

1. In `Conv(x, DequantizeLinear(W, ones)) -> Mul(scale)`, the first of the ones becomes 2, and the first
   channel of the scale is halved. A Transpose or Squeeze may precede the Mul.

OpenVINO 2025.4 replaces a weight's scales by one number if they are equal, as in graphs of trtq. Its
AVX2 kernel nevertheless reads one scale per channel, past the end of the array, and crashes from about
four thousand channels on. A factor of two does not change the digits of the result.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["BreakUniformScales"]


class BreakUniformScales(ir.passes.InPlacePass):
    """Scale the first channel of a convolution's weight by two, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Conv with a dequantised weight of equal scales that is followed by a Mul."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "Conv"]:
            weight = node.inputs[1].producer() if node.inputs[1] is not None else None
            rescale, last = _rescale(node)
            ones = _ones(weight)
            if weight is None or rescale is None or ones is None:
                continue
            factors = ones.copy()
            factors[0] = 2
            build = GraphBuilder(graph, f"{node.name}/uneven")
            weight.replace_input_with(1, build.constant("scales", factors))
            shape = (-1,) if last else (-1, 1, 1)
            half = build.constant("halves", (1 / factors).reshape(shape))
            # `ExpandLowBitToQdq` writes the scale second.
            scale = rescale.inputs[1]
            assert scale is not None
            rescale.replace_input_with(1, build.op("Mul", [scale, half], "scale"))
            graph.insert_before(rescale, build.nodes)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _ones(node: ir.Node | None) -> np.ndarray | None:
    """The scales of a quantised weight if there are several and all are 1, else None."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
        return None
    value = node.inputs[1]
    if value is None or value.const_value is None:
        return None
    scales: np.ndarray = value.const_value.numpy()
    return scales if scales.ndim == 1 and len(scales) > 1 and (scales == 1).all() else None


def _rescale(conv: ir.Node) -> tuple[ir.Node | None, bool]:
    """The Mul after a convolution, and whether its channels are the last axis, see `MatMulToConv`."""
    value, last = conv.outputs[0], False
    while True:
        uses = list(value.uses())
        if len(uses) != 1:
            return None, last
        node = uses[0].node
        if node.op_type == "Mul":
            return node, last
        if node.op_type not in ("Transpose", "Squeeze"):
            return None, last
        value, last = node.outputs[0], True
