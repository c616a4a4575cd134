"""Computes products of two activations in float, for processors whose integer products saturate.

1. In a MatMul of two activations with cast codes, `QuantizeLinear -> Cast` becomes
   `Round -> Max(-128) -> Min(127)` in float.

The casts mark products with codes beyond `PAIR_SAFE`, see rule 3 of `ExpandLowBitToQdq`. The values of
codes and result do not change. `WideWeightsToFloat` is the counterpart for weights.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["WideProductsToFloat"]

_INT8 = (-128.0, 127.0)


class WideProductsToFloat(ir.passes.InPlacePass):
    """Round and clip activations in float in front of a MatMul, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every MatMul of two activations whose codes are cast."""
        graph = model.graph
        products = [
            node
            for node in graph
            if node.op_type == "MatMul" and all(map(self._quantize, node.inputs))
        ]
        for node in products:
            for index, value in enumerate(node.inputs):
                assert value is not None
                node.replace_input_with(index, self._rounded(graph, node, value, index))
        if products:
            self._drop_unused(graph)
        return ir.passes.PassResult(model, modified=bool(products))

    @staticmethod
    def _quantize(value: ir.Value | None) -> ir.Node | None:
        """The QuantizeLinear whose codes are cast to a value; None if the value is not such a cast."""
        cast = value.producer() if value is not None else None
        if cast is None or cast.op_type != "Cast":
            return None
        codes = cast.inputs[0]
        quantize = codes.producer() if codes is not None else None
        return quantize if quantize is not None and quantize.op_type == "QuantizeLinear" else None

    def _rounded(self, graph: ir.Graph, node: ir.Node, value: ir.Value, index: int) -> ir.Value:
        quantize = self._quantize(value)
        assert quantize is not None
        build = GraphBuilder(graph, f"{node.name}/wide_{index}")
        y = build.op("Round", [quantize.inputs[0]], "rounded")
        for operator, limit in zip(("Max", "Min"), _INT8, strict=True):
            bound = build.constant(operator.lower(), np.array(limit, np.float32))
            y = build.op(operator, [y, bound], f"clipped_{operator.lower()}")
        y.shape, y.type = value.shape, value.type
        graph.insert_before(node, build.nodes)
        result: ir.Value = y
        return result

    @staticmethod
    def _drop_unused(graph: ir.Graph) -> None:
        for kind in ("Cast", "QuantizeLinear"):
            for node in [n for n in graph if n.op_type == kind]:
                if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                    graph.remove(node, safe=True)
