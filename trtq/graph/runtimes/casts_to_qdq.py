"""Restores quantise pairs, for runtimes whose products do not saturate.

1. In a MatMul whose operands are both cast codes, `QuantizeLinear -> Cast` becomes
   `QuantizeLinear -> DequantizeLinear(1)`, and `Cast(int8 W)` becomes `DequantizeLinear(int8 W, 1)`.

In an exported graph the codes of products that a plain session of onnxruntime could compute wrongly are
cast, see rule 3 of `ExpandLowBitToQdq`. Compilers need the pair and compute a cast operand in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["CastsToQdq"]


class CastsToQdq(ir.passes.InPlacePass):
    """Replace Casts of codes by DequantizeLinear, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every MatMul whose operands are both Casts of int8 codes."""
        graph = model.graph
        pairs: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in [n for n in graph if n.op_type == "MatMul"]:
            casts = [value.producer() if value is not None else None for value in node.inputs]
            if not all(cast is not None and _casts_codes(cast) for cast in casts):
                continue
            for index, cast in enumerate(casts):
                assert cast is not None
                build = GraphBuilder(graph, (node.name or "").rpartition("/")[0])
                out = cast.outputs[0]
                if out not in pairs:
                    pairs[out] = _dequantized(build, cast, index)
                    graph.insert_before(node, build.nodes)
                node.replace_input_with(index, pairs[out])
                if not out.uses():
                    graph.remove(cast, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _casts_codes(cast: ir.Node) -> bool:
    """Whether a node casts int8 codes: from QuantizeLinear, from a constant, or from 4-bit weights."""
    if cast.op_type != "Cast" or cast.attributes["to"].as_int() != ir.DataType.FLOAT:
        return False
    codes = cast.inputs[0]
    if codes is None:
        return False
    producer = codes.producer()
    if producer is None:
        return codes.const_value is not None and codes.const_value.dtype == ir.DataType.INT8
    return producer.op_type in ("QuantizeLinear", "Sub")


def _dequantized(build: GraphBuilder, cast: ir.Node, index: int) -> ir.Value:
    """The result of a cast, computed by a DequantizeLinear of the activation or weight instead."""
    codes = cast.inputs[0]
    assert codes is not None
    quantize = codes.producer()
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        # The constants are those of QuantizeLinear; `index` distinguishes the operands of a product.
        inputs = [codes, *quantize.inputs[1:]]
        y = build.op("DequantizeLinear", inputs, f"paired_{index}")
    else:
        ones = build.constant("ones", np.ones(_columns(codes), np.float32))
        y = build.op("DequantizeLinear", [codes, ones], "weight_paired", {"axis": 1})
    (out,) = cast.outputs
    y.shape, y.type = out.shape, ir.TensorType(ir.DataType.FLOAT)
    result: ir.Value = y
    return result


def _columns(value: ir.Value) -> int:
    """N of a weight `[K, N]`, from the constant that it is computed from."""
    while value.const_value is None:
        producer = value.producer()
        assert producer is not None
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
    return int(value.const_value.shape[-1])  # type: ignore[arg-type]
