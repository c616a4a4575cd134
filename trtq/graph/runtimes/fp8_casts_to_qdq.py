"""Restores quantise pairs of FP8, which TensorRT recognises.

1. `QuantizeLinear(fp8) -> Cast(float)` becomes `QuantizeLinear -> DequantizeLinear(1)`.
2. `Cast(FP8 W)` of a constant becomes `DequantizeLinear(FP8 W, ones)` with one scale per output channel.

Rule 1 of `trtq.graph.passes.fp8_nodes` explains why the file has casts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["Fp8CastsToQdq"]


class Fp8CastsToQdq(ir.passes.InPlacePass):
    """Replace Casts of FP8 codes by DequantizeLinear, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Cast of FP8 codes to float."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "Cast"]:
            codes = node.inputs[0]
            if codes is None or node.attributes["to"].as_int() != ir.DataType.FLOAT:
                continue
            build = GraphBuilder(graph, (node.name or "").rpartition("/")[0])
            y = self._activation(build, codes) or self._weight(build, node, codes)
            if y is None:
                continue
            (out,) = node.outputs
            y.shape, y.type = out.shape, ir.TensorType(ir.DataType.FLOAT)
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _activation(build: GraphBuilder, codes: ir.Value) -> ir.Value | None:
        quantize = codes.producer()
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return None
        zero = quantize.inputs[2].const_value if len(quantize.inputs) > 2 else None  # type: ignore[union-attr]
        if zero is None or zero.dtype != ir.DataType.FLOAT8E4M3FN:
            return None
        y: ir.Value = build.op("DequantizeLinear", [codes, *quantize.inputs[1:]], "paired")
        return y

    @staticmethod
    def _weight(build: GraphBuilder, node: ir.Node, codes: ir.Value) -> ir.Value | None:
        stored = codes.const_value
        if stored is None or stored.dtype != ir.DataType.FLOAT8E4M3FN:
            return None
        transposed = any(use.node.op_type == "MatMul" for use in node.outputs[0].uses())
        axis = 1 if transposed else 0
        ones = build.constant("ones", np.ones(int(stored.shape[axis]), np.float32))  # type: ignore[arg-type]
        y: ir.Value = build.op("DequantizeLinear", [codes, ones], "weight_paired", {"axis": axis})
        return y
