"""Converts products with integer weights to 1 x 1 convolutions, for OpenVINO without VNNI.

1. `MatMul(x[B, L, K], DequantizeLinear(W[K, N]))` becomes a Conv of `x[B, K, 1, L]` with `W[N, K, 1,
   1]`, between a Transpose to and a Transpose from channels first.

On AVX2, OpenVINO's integer matrix product is no faster than its float product, but its integer
convolution is twice as fast. Its layout is channels last, so both transposes are free. The integers
and hence the result are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["MatMulToConv"]


class MatMulToConv(ir.passes.InPlacePass):
    """Replace MatMul by Conv, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every MatMul of a quantised activation of rank 3 with a quantised weight."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "MatMul"]:
            x, weight = node.inputs
            dequantize = weight.producer() if weight is not None else None
            if x is None or x.shape is None or len(x.shape) != 3 or not _is_weight(dequantize):
                continue
            codes = x.producer()
            if codes is None or codes.op_type != "DequantizeLinear":
                continue
            assert dequantize is not None
            build = GraphBuilder(graph, f"{node.name}/as_conv")
            y = self._conv(build, x, self._kernel(build, dequantize))
            (out,) = node.outputs
            y.shape, y.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            if not dequantize.outputs[0].uses():
                graph.remove(dequantize, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _kernel(build: GraphBuilder, dequantize: ir.Node) -> ir.Value:
        """The weight `[K, N]` as `[N, K, 1, 1]`, transposed as integers."""
        integers, scale = dequantize.inputs[:2]
        assert integers is not None
        assert scale is not None
        turned = build.op("Transpose", [integers], "turned", {"perm": [1, 0]})
        pixel = build.constant("pixel", np.array([2, 3], np.int64))
        kernel = build.op("Unsqueeze", [turned, pixel], "kernel")
        y: ir.Value = build.op("DequantizeLinear", [kernel, scale], "kernel_float", {"axis": 0})
        return y

    @staticmethod
    def _conv(build: GraphBuilder, x: ir.Value, kernel: ir.Value) -> ir.Value:
        """x[B, L, K] -> y[B, L, N]."""
        row = build.constant("row", np.array([1], np.int64))
        y = build.op("Unsqueeze", [x, row], "image")
        y = build.op("Transpose", [y], "channels_first", {"perm": [0, 3, 1, 2]})
        y = build.op("Conv", [y, kernel], "conv")
        y = build.op("Transpose", [y], "channels_last", {"perm": [0, 2, 3, 1]})
        out: ir.Value = build.op("Squeeze", [y, row], "sequence")
        return out


def _is_weight(node: ir.Node | None) -> bool:
    """Whether a node is the DequantizeLinear of a layer's weight, with scales per channel."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
        return False
    integers, scale = node.inputs
    if integers is None or scale is None or scale.const_value is None:
        return False
    producer = integers.producer()
    # Codes of activations come from QuantizeLinear, 4-bit weights from Sub, see `ExpandLowBitToQdq`.
    constant = integers.const_value is not None or (producer and producer.op_type == "Sub")
    return bool(constant) and len(scale.const_value.shape) == 1
