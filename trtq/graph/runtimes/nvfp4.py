"""Rewrites products in NVFP4 for each runtime.

1. For TensorRT, from opset 23 on:

       Cast(half) -> trt::TRT_FP4DynamicQuantize(UNIT)
         -> DequantizeLinear with DequantizeLinear(scales, UNIT)
         -> Cast(half) -> MatMul with the same of FLOAT4E2M1 codes -> Cast(float)

   The form is that of NVIDIA's exporter. The operator takes inputs with 2 or 3 axes; others are
   reshaped.
2. For other runtimes, the same numbers from standard operators: block scales by ReduceMax and a
   QuantizeLinear to float8e4m3fn, E2M1 numbers by Round. The weight is INT8 (twice the number), with a
   blocked DequantizeLinear. This is a reference, not a fast path.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtq.graph.nodes import DOMAIN
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.nvfp4_nodes import NVFP4_MATMUL
from trtq.quant.formats.e2m1 import BLOCK, E2M1, UNIT

__all__ = ["ExpandNvfp4"]

_TRT_DOMAIN = "trt"
_OPSET, _IR_VERSION = 23, 11
_FLOAT, _HALF = ({"to": dtype.value} for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16))
_NATIVE_RANKS = (2, 3)


class ExpandNvfp4(ir.passes.InPlacePass):
    """Replace every `trtq::Nvfp4MatMul`, see the module docstring.

    Args:
        native: whether to use TensorRT's operators instead of standard ones.
    """

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self.native = native
        self._inputs: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every `trtq::Nvfp4MatMul`."""
        graph = model.graph
        nodes = [n for n in graph if n.domain == DOMAIN and n.op_type == NVFP4_MATMUL]
        for node in nodes:
            x, codes, scales = node.inputs
            assert x is not None
            patterns = _patterns(codes)
            axes = node.attributes["rank"].as_int(), len(patterns)
            build = GraphBuilder(graph, node.name or NVFP4_MATMUL)
            if x not in self._inputs:
                self._inputs[x] = (_native_input if self.native else _standard_input)(
                    build, x, *axes
                )
            # Constants of all calls of a layer have the layer's name.
            shared = GraphBuilder(graph, build.prefix, node.attributes["name"].as_string())
            shared.nodes = build.nodes
            weight = (_native_weight if self.native else _standard_weight)(shared, patterns, scales)
            y = build.op("MatMul", [self._inputs[x], weight], "matmul")
            (out,) = node.outputs
            if self.native:
                y = build.op("Cast", [y], "float", _FLOAT)
                y = _with_leading_axes(build, x, y, axes[0], patterns.shape[1])
            y.shape, y.type = out.shape, ir.TensorType(ir.DataType.FLOAT)
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
        if nodes and self.native:
            model.opset_imports[""] = max(_OPSET, model.opset_imports.get("", 0))
            model.opset_imports[_TRT_DOMAIN] = 1
            model.ir_version = max(_IR_VERSION, model.ir_version)
        if nodes and all(node.domain != DOMAIN for node in graph):
            model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _native_input(build: GraphBuilder, x: ir.Value, rank: int, width: int) -> ir.Value:
    """The numbers of an input in half precision, with 2 or 3 axes."""
    unit = build.constant("unit", np.array(UNIT, np.float32))
    y = x
    if rank not in _NATIVE_RANKS:
        rows = build.constant("rows", np.array([-1, width], np.int64))
        y, rank = build.op("Reshape", [y, rows], "flat"), 2
    y = build.op("Cast", [y], "half", _HALF)
    quantize = ir.node(
        "TRT_FP4DynamicQuantize",
        [y, unit],
        {"axis": -1, "block_size": BLOCK, "scale_type": ir.DataType.FLOAT8E4M3FN.value},
        domain=_TRT_DOMAIN,
        num_outputs=2,
        name=f"{build.prefix}/quantize",
    )
    build.nodes.append(quantize)
    for output, what in zip(quantize.outputs, ("codes", "block_scales"), strict=True):
        output.name = f"{build.prefix}/{what}"
    codes, scales = quantize.outputs
    codes.type = ir.TensorType(ir.DataType.FLOAT4E2M1)
    scales.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    steps = build.op("DequantizeLinear", [scales, unit], "block_steps")
    attributes = {"axis": rank - 1, "block_size": BLOCK}
    y = build.op("DequantizeLinear", [codes, steps], "numbers", attributes)
    result: ir.Value = build.op("Cast", [y], "numbers_half", _HALF)
    return result


def _native_weight(build: GraphBuilder, patterns: np.ndarray, scales: ir.Value | None) -> ir.Value:
    """The numbers of a weight `[K, N]` in half precision."""
    unit = build.constant("unit", np.array(UNIT, np.float32))
    numbers = ir.tensor(patterns.view(ml_dtypes.float4_e2m1fn), dtype=ir.DataType.FLOAT4E2M1)
    stored = build.constant("weight_fp4", numbers)
    steps = build.op("DequantizeLinear", [scales, unit], "weight_steps")
    attributes = {"axis": 0, "block_size": BLOCK}
    y = build.op("DequantizeLinear", [stored, steps], "weight_numbers", attributes)
    y = build.op("Cast", [y], "weight_half", _HALF)
    result: ir.Value = y
    return result


def _with_leading_axes(
    build: GraphBuilder, x: ir.Value, y: ir.Value, rank: int, channels: int
) -> ir.Value:
    """A product `[M, N]` with all but the last axis of `x`, if the input was reshaped."""
    if rank in _NATIVE_RANKS:
        return y
    last = build.constant("channels", np.array([channels], np.int64))
    shape = last
    if rank > 1:
        leading = build.op("Shape", [x], "leading", {"start": 0, "end": -1})
        shape = build.op("Concat", [leading, last], "shape", {"axis": 0})
    result: ir.Value = build.op("Reshape", [y, shape], "restored")
    return result


def _patterns(codes: ir.Value | None) -> np.ndarray:
    """Bit patterns of E2M1, uint8 `[K, N]`."""
    assert codes is not None
    assert codes.const_value is not None
    signed = codes.const_value.numpy().astype(np.int8)
    return (signed & 0xF).astype(np.uint8)


def _standard_weight(
    build: GraphBuilder, patterns: np.ndarray, scales: ir.Value | None
) -> ir.Value:
    """The numbers of a weight `[K, N]` in float32, from INT8 codes of twice the number."""
    assert scales is not None
    assert scales.const_value is not None
    twice = np.array([2 * number for number in (*E2M1, *(-n for n in E2M1))], np.int8)
    stored = build.constant("weight_twice", twice[patterns])
    steps = scales.const_value.numpy().astype(np.float32) * np.float32(UNIT / 2)
    halves = build.constant("weight_steps", steps)
    attributes = {"axis": 0, "block_size": BLOCK}
    y: ir.Value = build.op("DequantizeLinear", [stored, halves], "weight_numbers", attributes)
    return y


def _standard_input(build: GraphBuilder, x: ir.Value, rank: int, width: int) -> ir.Value:
    """The numbers of an input in float32; operation by operation as `formats.e2m1.input_numbers`."""

    def number(name: str, value: float) -> ir.Value:
        return build.constant(name, np.array(value, np.float32))

    def op(operator: str, inputs: list[Any], name: str, **attributes: Any) -> Any:
        return build.op(operator, inputs, name, attributes)

    blocks = build.constant("blocks", np.array([0] * (rank - 1) + [width // BLOCK, BLOCK]))
    whole = build.constant("whole", np.array([0] * (rank - 1) + [width]))
    one, two, unit = number("one", 1), number("two", 2), number("unit", UNIT)
    u = op("Cast", [op("Cast", [x], "half", **_HALF)], "rounded", **_FLOAT)
    u = op("Reshape", [u, blocks], "in_blocks")
    axes = build.constant("last", np.array([-1], np.int64))
    largest = op("ReduceMax", [op("Abs", [u], "sizes"), axes], "largest", keepdims=1)
    scale = op("Div", [largest, number("six", 6)], "sixth")
    scale = op("Mul", [scale, number("per_unit", 1 / UNIT)], "in_units")
    zero = build.constant("zero_fp8", np.array(0, ml_dtypes.float8_e4m3fn))
    scale = op("Cast", [op("QuantizeLinear", [scale, one, zero], "scale_codes")], "scale", **_FLOAT)
    step = op("Mul", [scale, unit], "step")
    positive = op("Greater", [scale, number("zero", 0)], "positive")
    v = op("Div", [u, op("Where", [positive, step, one], "divisor")], "ratio")
    size = op("Abs", [v], "size")
    small = op("Div", [op("Round", [op("Mul", [size, two], "twice")], "small_code"), two], "small")
    large = op(
        "Mul", [op("Round", [op("Div", [size, two], "half_size")], "large_code"), two], "large"
    )
    below = op("Less", [size, number("four", 4)], "below_4")
    middle = op("Where", [below, op("Round", [size], "middle"), large], "middle_or_large")
    chosen = op("Where", [op("Less", [size, two], "below_2"), small, middle], "number")
    chosen = op("Min", [chosen, number("max", E2M1[-1])], "saturated")
    y = op("Mul", [op("Mul", [chosen, op("Sign", [v], "sign")], "signed"), step], "numbers")
    result: ir.Value = op("Reshape", [y, whole], "together")
    return result
