"""Products of two wide activations in float, for processors whose integer products saturate."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.export.passes.builder import GraphBuilder

__all__ = ["FloatWideProducts"]

_INT8 = (-128.0, 127.0)


class FloatWideProducts(ir.passes.InPlacePass):
    """Round and clip in float in front of a MatMul of activations whose codes go beyond `PAIR_SAFE`.

    The counterpart of `FloatWideWeights`: the codes stay what they are, so the result does, too. Such
    products are told by their DequantizeLinear without a zero point, see `ExpandLowBitToQdq`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every MatMul of two quantised activations of which the second is wide."""
        graph = model.graph
        found = [node for node in graph if node.op_type == "MatMul" and self._wide(node)]
        for node in found:
            for index, value in enumerate(node.inputs):
                assert value is not None
                node.replace_input_with(index, self._rounded(graph, node, value, index))
        if found:
            self._drop_unused(graph)
        return ir.passes.PassResult(model, modified=bool(found))

    @staticmethod
    def _quantize(value: ir.Value | None) -> ir.Node | None:
        """The QuantizeLinear behind a DequantizeLinear; None if it is something else."""
        dequantize = value.producer() if value is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        codes = dequantize.inputs[0]
        quantize = codes.producer() if codes is not None else None
        return quantize if quantize is not None and quantize.op_type == "QuantizeLinear" else None

    def _wide(self, node: ir.Node) -> bool:
        right = node.inputs[1]
        if any(self._quantize(value) is None for value in node.inputs):
            return False
        return len(right.producer().inputs) == 2  # type: ignore[union-attr]

    def _rounded(self, graph: ir.Graph, node: ir.Node, value: ir.Value, index: int) -> ir.Value:
        quantize = self._quantize(value)
        assert quantize is not None
        build = GraphBuilder(graph, f"{node.name}/wide_{index}")
        y = build.op("Round", [quantize.inputs[0]], "rounded")  # type: ignore[list-item]
        for operator, limit in zip(("Max", "Min"), _INT8, strict=True):
            bound = build.constant(operator.lower(), np.array(limit, np.float32))
            y = build.op(operator, [y, bound], f"clipped_{operator.lower()}")
        y.shape, y.type = value.shape, value.type
        graph.insert_before(node, build.nodes)
        result: ir.Value = y
        return result

    @staticmethod
    def _drop_unused(graph: ir.Graph) -> None:
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            for node in [n for n in graph if n.op_type == kind]:
                if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                    graph.remove(node, safe=True)
