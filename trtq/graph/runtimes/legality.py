"""Finds the layers of a graph that a runtime refuses, computes wrongly or runs in float.

The rules come from observations with TensorRT-RTX 1.7, onnxruntime 1.31 and OpenVINO 2026.4, and from
the guides of TensorRT 10.16 and 11.4. A graph is checked after `prepare` has rewritten it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.low_bit_to_qdq import PAIR_SAFE
from trtq.graph.runtimes.findings import (
    Finding,
    constant_of,
    dequantized_by,
    input_of,
    layer_of,
    operands_of,
    producer_of,
)
from trtq.graph.runtimes.format_rules import int8_blocks
from trtq.graph.runtimes.prepare import Runtime
from trtq.graph.runtimes.weight_only import is_weight_only
from trtq.processor import has_vnni

__all__ = ["Finding", "check"]

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_DECOMPOSED_INTEGERS = (
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
)
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


_Rule = Callable[[ir.Node], Iterator[Finding]]


def _operators(node: ir.Node) -> Iterator[Finding]:
    if node.op_type in _DECOMPOSED_INTEGERS:
        yield Finding(
            layer_of(node),
            f"uses {node.op_type}, which is not among the operators that the parser supports",
            "export it with --target qdq, which uses quantise-dequantise pairs instead",
        )


def _doubles(node: ir.Node) -> Iterator[Finding]:
    # The file may lack the types of values between nodes, but only casts and constants make float64.
    to = node.attributes.get("to")
    constants = [constant_of(value) for value in node.inputs]
    if (to is not None and to.as_int() == ir.DataType.DOUBLE) or any(
        stored is not None and stored.dtype == ir.DataType.DOUBLE for stored in constants
    ):
        yield Finding(
            layer_of(node),
            f"{node.op_type} uses float64, which this runtime does not support",
            "run the pass CastFloat64ToFloat32 over the graph",
        )


def _zero_points(node: ir.Node) -> Iterator[Finding]:
    if node.op_type not in _PAIR or input_of(node, 2) is None:
        return
    zero_point = constant_of(node.inputs[2])
    if zero_point is None or bool(zero_point.numpy().astype(np.int16).any()):
        yield Finding(
            layer_of(node),
            f"{node.op_type} has a zero point that is not a constant zero",
            "use signed codes around float zero: round, Max(low), Min(high), and no zero point",
        )
    elif zero_point.dtype == ir.DataType.UINT8:
        yield Finding(
            layer_of(node),
            f"{node.op_type} is unsigned (uint8)",
            "quantise to int8; 8-bit activations are symmetric",
        )


def _constant_scales(node: ir.Node) -> Iterator[Finding]:
    if "block_size" in node.attributes and dequantized_by(input_of(node, 1)) is not None:
        return  # Block scales are codes themselves.
    if node.op_type in _PAIR and constant_of(node.inputs[1]) is None:
        yield Finding(
            layer_of(node),
            f"{node.op_type} has a computed scale: products fall back to float, and a convolution "
            "behind it ends the builder's process",
            "multiply by the scale of the step outside, and quantise with the constant 1",
        )


def _activation_scales(node: ir.Node) -> Iterator[Finding]:
    scale = constant_of(input_of(node, 1))
    if node.op_type == "QuantizeLinear" and scale is not None and scale.size > 1:
        yield Finding(
            layer_of(node),
            f"an activation has {scale.size} scales; only weights may have one per channel or block",
            "use one scale per tensor, and put factors per channel into the weight",
        )


def _float_scales(node: ir.Node) -> Iterator[Finding]:
    scale = input_of(node, 1)
    if node.op_type == "DequantizeLinear" and is_weight_only(node):
        return  # The product itself is one of half-precision numbers.
    if node.op_type in _PAIR and scale is not None and scale.dtype == ir.DataType.FLOAT16:
        yield Finding(
            layer_of(node),
            f"{node.op_type} has a float16 scale, so the product is summed in float16, whose maximum is "
            "65504",
            "use float32 scales around the product, and cast behind them",
        )


def _int4_uses(node: ir.Node) -> Iterator[Finding]:
    for value in node.inputs:
        stored = constant_of(value)
        if stored is None or stored.dtype not in _FOUR_BITS:
            continue
        if stored.dtype == ir.DataType.UINT4:
            yield Finding(
                layer_of(node),
                "uses UINT4 constants, which this runtime does not support",
                "store the codes as INT4, minus 8",
            )
        elif node.op_type != "DequantizeLinear":
            yield Finding(
                layer_of(node),
                f"an INT4 constant feeds {node.op_type}; only DequantizeLinear and plugins support it",
                "run the pass CastInt4ToInt8 over the graph",
            )


def _int4_products(node: ir.Node) -> Iterator[Finding]:
    if node.op_type not in _PRODUCTS:
        return
    activation, weight, stored = operands_of(node)
    if stored is None or stored.dtype not in _FOUR_BITS:
        return
    if activation is not None:
        yield Finding(
            layer_of(node),
            f"{node.op_type} of INT4 weights with quantised activations: a convolution is refused, and "
            "the block scales of a matrix product are applied in the wrong place",
            "cast the weight to int8 (CastInt4ToInt8), or use the packed form of the plugin",
        )
    elif node.op_type == "Conv" and "block_size" in weight.attributes:  # type: ignore[union-attr]
        yield Finding(
            layer_of(node),
            "the weight of a convolution has scales per block of input channels",
            "use scales per output channel",
        )


def _saturating_pairs(node: ir.Node) -> Iterator[Finding]:
    """Matrix products with constant weights that onnxruntime's own rewrites compute wrongly."""
    if node.op_type not in ("MatMul", "Gemm"):
        return
    activation, weight, stored = operands_of(node)
    if stored is None or stored.dtype not in _EIGHT_BITS:
        return
    if weight is not None and is_weight_only(weight):
        return  # Sessions of trtq set the accuracy level at which activations stay float.
    largest = int(np.abs(stored.numpy().astype(np.int16)).max())
    if activation is None and node.op_type == "MatMul":
        yield Finding(
            layer_of(node),
            "a dequantised weight with a float activation, which onnxruntime 1.31 quantises itself",
            "cast the weight's codes to float",
        )
    elif activation is not None and largest > PAIR_SAFE and not has_vnni():
        yield Finding(
            layer_of(node),
            f"weights up to {largest} in a quantise pair saturate on a processor without VNNI",
            "export it again, which casts such codes to float instead of dequantising them",
        )


def _cast_codes(node: ir.Node) -> Iterator[Finding]:
    """Products of codes that compilers compute in float."""
    if node.op_type not in _PRODUCTS:
        return
    cast = producer_of(node.inputs[0])
    codes = producer_of(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if codes is not None and codes.op_type == "QuantizeLinear":
        yield Finding(
            layer_of(node),
            "codes that are cast, not dequantised, are multiplied in float",
            "run the pass CastsToQdq over the graph",
            fatal=False,
        )


def _float_products(node: ir.Node) -> Iterator[Finding]:
    """Products of integers that OpenVINO computes in float."""
    if node.op_type not in _PRODUCTS:
        return
    activation, weight, stored = operands_of(node)
    if activation is not None and weight is None:
        yield Finding(
            layer_of(node),
            "8-bit weights run in float on a processor without VNNI, where integer sums saturate",
            "use weights of at most 7 bits (w7a8, w4a8), or a processor with VNNI",
            fatal=False,
        )
    if weight is not None and is_weight_only(weight):
        return  # OpenVINO decompresses such a weight inside its float product.
    if stored is not None and stored.dtype in _FOUR_BITS:
        yield Finding(
            layer_of(node),
            "a 4-bit weight that feeds DequantizeLinear directly runs in float",
            "insert Cast(int8) and Sub(zero point) between them",
            fatal=False,
        )


_TENSORRT: tuple[_Rule, ...] = (
    _operators,
    _doubles,
    _zero_points,
    _constant_scales,
    _activation_scales,
    _float_scales,
    _int4_uses,
    _int4_products,
    _cast_codes,
)
_RULES: dict[Runtime, tuple[_Rule, ...]] = {
    "onnxruntime": (_saturating_pairs,),
    "openvino": (_doubles, _float_products, _cast_codes),
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": (*_TENSORRT, int8_blocks),
}


def check(model: ir.Model, runtime: Runtime) -> list[Finding]:
    """Find the layers that a runtime refuses, computes wrongly or runs in float, once per rule.

    Args:
        model: the graph, rewritten for the runtime by `trtq.graph.runtimes.prepare.prepare`.
        runtime: one of `RUNTIMES`.

    Returns:
        One finding per layer and broken rule.
    """
    findings: dict[Finding, None] = {}
    for rule in _RULES[runtime]:
        for node in model.graph:
            findings |= dict.fromkeys(rule(node))
    return list(findings)
