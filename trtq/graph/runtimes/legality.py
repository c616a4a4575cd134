"""Which layers of a graph a runtime refuses, computes wrongly or leaves in float, and what mends it.

The rules are what was seen with TensorRT-RTX 1.7, onnxruntime 1.31 and OpenVINO 2026.4, and what the
guides of TensorRT 10.16 and 11.4 say. A graph is checked as the runtime gets it, after `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.low_bit_to_qdq import PAIR_SAFE
from trtq.graph.runtimes.prepare import Runtime
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


@dataclass(frozen=True)
class Finding:
    """One layer that breaks one rule.

    Attributes:
        layer: its name, or the node's where it belongs to no layer.
        rule: what the runtime asks for, and what is there.
        fix: what to do.
        fatal: it is refused or computed wrongly; otherwise it runs, slower than it could.
    """

    layer: str
    rule: str
    fix: str
    fatal: bool = True


_Rule = Callable[[ir.Node], Iterator[Finding]]


def _layer(node: ir.Node) -> str:
    return (node.name or node.op_type).rpartition("/")[0] or (node.name or node.op_type)


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else value.const_value


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a value, if one does."""
    node = _producer(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _operands(
    node: ir.Node,
) -> tuple[ir.Node | None, ir.Node | None, ir.TensorProtocol | None]:
    """What dequantises a product's activation and its weight, and the weight's constant codes."""
    activation, weight = (_dequantized(_input(node, index)) for index in (0, 1))
    return activation, weight, _constant(weight.inputs[0]) if weight is not None else None


def _operators(node: ir.Node) -> Iterator[Finding]:
    if node.op_type in _DECOMPOSED_INTEGERS:
        yield Finding(
            _layer(node),
            f"{node.op_type} is not among the parser's operators",
            "export it with --target qdq, which says the same with quantise-dequantise pairs",
        )


def _doubles(node: ir.Node) -> Iterator[Finding]:
    # Types of values between nodes need not be in the file; float64 enters by casts and constants.
    to = node.attributes.get("to")
    constants = [_constant(value) for value in node.inputs]
    if (to is not None and to.as_int() == ir.DataType.DOUBLE) or any(
        stored is not None and stored.dtype == ir.DataType.DOUBLE for stored in constants
    ):
        yield Finding(
            _layer(node),
            f"{node.op_type} computes in float64, which the runtime has not",
            "run the pass CastFloat64ToFloat32 over the graph",
        )


def _zero_points(node: ir.Node) -> Iterator[Finding]:
    if node.op_type not in _PAIR or _input(node, 2) is None:
        return
    zero_point = _constant(node.inputs[2])
    if zero_point is None or bool(zero_point.numpy().astype(np.int16).any()):
        yield Finding(
            _layer(node),
            f"{node.op_type} has a zero point that is not a constant zero",
            "use codes lo .. hi around float zero: round, Max(lo), Min(hi), and no zero point",
        )
    elif zero_point.dtype == ir.DataType.UINT8:
        yield Finding(
            _layer(node),
            f"{node.op_type} is unsigned (uint8)",
            "quantise to int8; 8-bit activations are symmetric",
        )


def _constant_scales(node: ir.Node) -> Iterator[Finding]:
    if node.op_type in _PAIR and _constant(node.inputs[1]) is None:
        yield Finding(
            _layer(node),
            f"{node.op_type} has a scale that is computed: products fall back to float, and a "
            "convolution behind it ends the builder's process",
            "multiply by the step's scale outside, and quantise with the constant 1",
        )


def _activation_scales(node: ir.Node) -> Iterator[Finding]:
    scale = _constant(_input(node, 1))
    if node.op_type == "QuantizeLinear" and scale is not None and scale.size > 1:
        yield Finding(
            _layer(node),
            f"an activation has {scale.size} scales; only weights may have one per channel or block",
            "use one scale per tensor; what differs by channel belongs into the weight",
        )


def _float_scales(node: ir.Node) -> Iterator[Finding]:
    scale = _input(node, 1)
    if node.op_type in _PAIR and scale is not None and scale.dtype == ir.DataType.FLOAT16:
        yield Finding(
            _layer(node),
            f"{node.op_type} has a float16 scale, so the product's sums are kept in float16, which "
            "ends at 65504",
            "use float32 scales round the product and cast behind them",
        )


def _int4_uses(node: ir.Node) -> Iterator[Finding]:
    for value in node.inputs:
        stored = _constant(value)
        if stored is None or stored.dtype not in _FOUR_BITS:
            continue
        if stored.dtype == ir.DataType.UINT4:
            yield Finding(
                _layer(node), "UINT4 constants are not read", "store the codes as INT4, less 8"
            )
        elif node.op_type != "DequantizeLinear":
            yield Finding(
                _layer(node),
                f"an INT4 constant feeds {node.op_type}; only DequantizeLinear and plugins take it",
                "run the pass CastInt4ToInt8 over the graph",
            )


def _int4_products(node: ir.Node) -> Iterator[Finding]:
    if node.op_type not in _PRODUCTS:
        return
    activation, weight, stored = _operands(node)
    if stored is None or stored.dtype not in _FOUR_BITS:
        return
    if activation is not None:
        yield Finding(
            _layer(node),
            f"{node.op_type} of INT4 weights with quantised activations: a convolution is refused, "
            "a matrix product's block scales are put in the wrong place",
            "widen the weight to int8 (CastInt4ToInt8), or use the plugin's packed form",
        )
    elif node.op_type == "Conv" and "block_size" in weight.attributes:  # type: ignore[union-attr]
        yield Finding(
            _layer(node),
            "a convolution's weight is scaled in blocks of input channels",
            "scale it by output channel",
        )


def _wide_pairs(node: ir.Node) -> Iterator[Finding]:
    """What onnxruntime's own rewrites of matrix products with constant weights get wrong."""
    if node.op_type not in ("MatMul", "Gemm"):
        return
    activation, _, stored = _operands(node)
    if stored is None or stored.dtype not in _EIGHT_BITS:
        return
    largest = int(np.abs(stored.numpy().astype(np.int16)).max())
    if activation is None and node.op_type == "MatMul":
        yield Finding(
            _layer(node),
            "a dequantised weight beside a float activation, which onnxruntime 1.31 quantises itself",
            "cast the weight's codes to float",
        )
    elif activation is not None and largest > PAIR_SAFE and not has_vnni():
        yield Finding(
            _layer(node),
            f"weights up to {largest} in a quantise pair saturate on a processor without VNNI",
            "export it again: such codes are cast to float instead of dequantised",
        )


def _cast_codes(node: ir.Node) -> Iterator[Finding]:
    """Codes that compilers leave in float."""
    if node.op_type not in _PRODUCTS:
        return
    cast = _producer(node.inputs[0])
    codes = _producer(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if codes is not None and codes.op_type == "QuantizeLinear":
        yield Finding(
            _layer(node),
            "codes that are cast, not dequantised, are multiplied in float",
            "run the pass CastsToQdq over the graph",
            fatal=False,
        )


def _float_products(node: ir.Node) -> Iterator[Finding]:
    """What OpenVINO computes in float although both operands are whole numbers."""
    if node.op_type not in _PRODUCTS:
        return
    activation, weight, stored = _operands(node)
    if activation is not None and weight is None:
        yield Finding(
            _layer(node),
            "8-bit weights run in float on a processor without VNNI, where integer sums saturate",
            "use weights of at most 7 bits (w7a8, w4a8), or a processor with VNNI",
            fatal=False,
        )
    if stored is not None and stored.dtype in _FOUR_BITS:
        yield Finding(
            _layer(node),
            "a 4-bit weight that feeds DequantizeLinear itself runs in float",
            "put Cast(int8) and Sub(zero point) between them",
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
    "onnxruntime": (_wide_pairs,),
    "openvino": (_doubles, _float_products, _cast_codes),
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
}


def check(model: ir.Model, runtime: Runtime) -> list[Finding]:
    """What a runtime would refuse, get wrong or leave in float, each layer once per rule.

    Args:
        model: the graph as the runtime gets it, see `trtq.graph.runtimes.prepare.prepare`.
        runtime: one of `RUNTIMES`.
    """
    found: dict[Finding, None] = {}
    for rule in _RULES[runtime]:
        for node in model.graph:
            found |= dict.fromkeys(rule(node))
    return list(found)
