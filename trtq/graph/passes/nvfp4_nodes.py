"""Rewrites low-bit nodes in NVFP4 to one node for the product, with the scales outside.

1. A layer becomes

       Cast(float) -> Mul(1 / s[step]) -> Max(-LIMIT) -> Min(LIMIT)
         -> trtq::Nvfp4MatMul(x, codes [K, N], block scales [K / 16, N])
         -> Mul(d * s[step]) -> Add(bias) -> Cast

   No runtime but TensorRT has operators for it, so the node is rewritten when a graph is prepared, see
   `trtq.graph.runtimes.nvfp4`. Its attribute `rank` is the number of axes of x. Codes are the bit
   patterns of E2M1, stored as INT4, which a graph of opset 21 can hold; block scales are float8e4m3fn.
2. Inputs with the same value and the same scales share what stands in front of the node.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtq.graph.nodes import DOMAIN
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.step_values import StepValues
from trtq.quant.formats.nvfp4 import Nvfp4Tensors

__all__ = ["NVFP4_MATMUL", "expand_nvfp4"]

NVFP4_MATMUL = "Nvfp4MatMul"


def expand_nvfp4(
    builder: GraphBuilder, node: ir.Node, layer: Nvfp4Tensors, values: StepValues, scaled: ir.Value
) -> ir.Value:
    """Add the nodes of a layer and return its output, float32.

    Args:
        builder: builder that collects the nodes.
        node: the low-bit node, `trtq::LowBitLinear`.
        layer: tensors of the layer.
        values: values of the input at the current step.
        scaled: the input, divided by its scale and clipped.
    """
    weight = layer.weight

    def signed() -> np.ndarray:
        # A signed 4-bit number and a bit pattern of E2M1 are both four bits.
        patterns = np.ascontiguousarray(weight.codes.numpy().T).astype(np.int8)
        return np.where(patterns >= 8, patterns - 16, patterns).astype(ml_dtypes.int4)

    codes = builder.weight("weight", signed, weight.shape[::-1], ir.DataType.INT4)
    blocks = np.ascontiguousarray(weight.block_scale.numpy().T).view(ml_dtypes.float8_e4m3fn)
    scales = builder.constant("block_scale", blocks)
    product = ir.node(
        NVFP4_MATMUL,
        [scaled, codes, scales],
        {"name": builder.shared, "rank": len(node.inputs[0].shape)},  # type: ignore[union-attr, arg-type]
        domain=DOMAIN,
        name=f"{builder.prefix}/product",
    )
    (y,) = product.outputs
    y.name = f"{builder.prefix}/product"
    y.shape, y.type = node.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
    builder.nodes.append(product)
    y = builder.op("Mul", [y, values.scale], "rescaled")
    if layer.bias is not None:
        y = builder.op("Add", [y, builder.constant("bias", layer.bias.numpy())], "biased")
    result: ir.Value = y
    return result
