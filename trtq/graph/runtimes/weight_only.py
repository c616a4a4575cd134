"""Recognises weight-only layers in a graph: products of a dequantised weight and a float activation."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["is_weight_only"]

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def is_weight_only(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear holds the weight of products whose activations are float.

    Args:
        dequantize: node of type DequantizeLinear with constant codes.
    """
    uses = list(dequantize.outputs[0].uses())
    return bool(uses) and all(
        use.node.op_type in _PRODUCTS and use.idx == 1 and not _is_quantized(use.node.inputs[0])
        for use in uses
    )


def _is_quantized(value: ir.Value | None) -> bool:
    """Whether a value is dequantised or cast from codes."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("DequantizeLinear", "Cast"):
        return False
    if node.op_type == "DequantizeLinear":
        return True
    codes = node.inputs[0]
    producer = codes.producer() if codes is not None else None
    integers = (ir.DataType.INT8, ir.DataType.UINT8)
    return (producer is not None and producer.op_type == "QuantizeLinear") or (
        codes is not None and codes.dtype in integers
    )
