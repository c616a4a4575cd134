"""The integers of a weight in the graph, as operands of a product in float numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.tensors import LayerTensors

__all__ = ["integer_weight"]

_INT4_OFFSET = 8
_FLOAT = {"to": ir.DataType.FLOAT.value}


def integer_weight(
    builder: GraphBuilder, layer: LayerTensors, *, transposed: bool, paired: bool
) -> ir.Value:
    """The integers of a weight as float numbers: `[N, K, *kernel]`, or `[K, N]` if transposed.

    Args:
        builder: builder of the layer.
        layer: tensors of the layer.
        transposed: whether the weight is the second operand of a MatMul.
        paired: whether the integers are dequantised; otherwise they are cast.
    """
    packed = layer.weight
    shape = packed.shape[::-1] if transposed else packed.shape

    def oriented(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T) if transposed else array

    def codes() -> np.ndarray:
        signed: np.ndarray = packed.codes.numpy().astype(np.int8) - _INT4_OFFSET
        return oriented(signed).astype(ml_dtypes.int4)

    if packed.bits > 4:
        integers = builder.weight(
            "weight", lambda: oriented(packed.integers().numpy()), shape, ir.DataType.INT8
        )
    else:
        stored = builder.weight("weight", codes, shape, ir.DataType.INT4)
        offset = oriented(packed.zero_point.numpy().astype(np.int8) - _INT4_OFFSET)
        widened = builder.op("Cast", [stored], "weight_int8", {"to": ir.DataType.INT8.value})
        integers = builder.op(
            "Sub", [widened, builder.constant("weight_zero_point", offset)], "weight_integers"
        )
    weight: ir.Value
    if paired:
        scale = builder.constant("ones", np.ones(packed.channels, np.float32))
        axis = {"axis": 1 if transposed else 0}
        weight = builder.op("DequantizeLinear", [integers, scale], "weight_float", axis)
    else:
        weight = builder.op("Cast", [integers], "weight_float", _FLOAT)
    return weight
