"""Rewrites weight-only low-bit nodes to a product with a dequantised weight.

1. A linear layer becomes

       x -> MatMul with DequantizeLinear(INT4 [K, N], d [K / G, N], axis 0, block_size G) -> Add(bias)

   without groups `DequantizeLinear(INT4 [K, N], d [N], axis 1)`; 8-bit codes are INT8.
2. A convolution becomes `Conv` with `DequantizeLinear(INT4 [N, K, *kernel], d [N], axis 0)` and Add.

Codes are symmetric (`q - 2**(bits - 1)`), so there is no zero point. Scales and bias have the float type
of the graph. onnxruntime, OpenVINO and TensorRT read this form from opset 21 on.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.formats.weight_only import WeightOnlyTensors

__all__ = ["expand_weight_only"]

_CONVOLUTION_ATTRIBUTES = ("strides", "pads", "dilations", "group")


def expand_weight_only(
    builder: GraphBuilder, node: ir.Node, layer: WeightOnlyTensors, x: ir.Value
) -> ir.Value:
    """Add the nodes of a weight-only layer and return its output.

    Args:
        builder: builder that collects the nodes.
        node: the low-bit node, `trtq::LowBitLinear` or a convolution.
        layer: tensors of the layer.
        x: the input, transformed.
    """
    assert x.shape is not None
    linear = node.op_type == "LowBitLinear"
    dtype = np.float16 if x.dtype == ir.DataType.FLOAT16 else np.float32
    weight = _weight(builder, layer, dtype, transposed=linear)
    if linear:
        y = builder.op("MatMul", [x, weight], "matmul")
    else:
        attributes = {key: node.attributes[key].value for key in _CONVOLUTION_ATTRIBUTES}
        y = builder.op("Conv", [x, weight], "conv", attributes)
    if layer.bias is not None:
        channel = (-1,) if linear else (-1, *(1,) * (len(x.shape) - 2))
        bias = layer.bias.numpy().astype(dtype).reshape(channel)
        y = builder.op("Add", [y, builder.constant("bias", bias)], "biased")
    result: ir.Value = y
    return result


def _weight(
    builder: GraphBuilder, layer: WeightOnlyTensors, dtype: type, *, transposed: bool
) -> ir.Value:
    """The dequantised weight, `[K, N]` if transposed, else `[N, K, *kernel]`."""
    packed = layer.weight

    def codes() -> np.ndarray:
        integers = packed.integers().numpy()
        if transposed:
            integers = np.ascontiguousarray(integers.T)
        return integers.astype(ml_dtypes.int4) if packed.bits == 4 else integers

    scale: np.ndarray = packed.scale.numpy().astype(dtype)
    if packed.group is None:
        attributes = {"axis": 1 if transposed else 0}
        scale = scale.reshape(-1)
    else:
        attributes = {"axis": 0, "block_size": packed.group}
        scale = np.ascontiguousarray(scale.T)
    stored = builder.weight(
        "weight",
        codes,
        packed.shape[::-1] if transposed else packed.shape,
        ir.DataType.INT4 if packed.bits == 4 else ir.DataType.INT8,
    )
    inputs = [stored, builder.constant("weight_scale", scale)]
    weight: ir.Value = builder.op("DequantizeLinear", inputs, "weight_float", attributes)
    return weight
