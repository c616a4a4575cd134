"""Rewrites low-bit nodes in FP8 to a product of E4M3 numbers with the scales outside.

1. A layer becomes

       Cast(float) -> Mul(1 / s[step]) -> QuantizeLinear(1, float8e4m3fn) -> Cast(float)
         -> Conv | MatMul with Cast(float8e4m3fn W) -> Mul(d * s[step]) -> Add(bias) -> Cast

   QuantizeLinear saturates at 448. Codes are cast, not dequantised, since onnxruntime turns a pair of
   FP8 in front of a MatMul into an operator that does not support FP8 (versions 1.24 and 1.31).
   `Fp8CastsToQdq` makes pairs of the casts for TensorRT.
2. Inputs with the same value and the same scales share their codes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.step_values import StepValues
from trtq.quant.formats.fp8 import Fp8Tensors

__all__ = ["Fp8Nodes"]

_CONVOLUTION_ATTRIBUTES = ("strides", "pads", "dilations", "group")
_FLOAT = {"to": ir.DataType.FLOAT.value}


class Fp8Nodes:
    """Adds the nodes of FP8 layers to one graph."""

    def __init__(self) -> None:
        self._codes: dict[str, ir.Value] = {}
        """Cast codes by name of the quantiser."""

    def expand(
        self,
        builder: GraphBuilder,
        node: ir.Node,
        layer: Fp8Tensors,
        values: StepValues,
        scaled: ir.Value,
    ) -> ir.Value:
        """Add the nodes of a layer and return its output, float32.

        Args:
            builder: builder that collects the nodes.
            node: the low-bit node.
            layer: tensors of the layer.
            values: values of the input at the current step.
            scaled: the input, divided by its scale.
        """
        (x,) = node.inputs
        assert x is not None
        assert x.shape is not None
        linear = node.op_type == "LowBitLinear"
        codes = self._quantized(builder, values, scaled, x)
        weight = self._weight(builder, layer, transposed=linear)
        if linear:
            y = builder.op("MatMul", [codes, weight], "matmul")
        else:
            attributes = {key: node.attributes[key].value for key in _CONVOLUTION_ATTRIBUTES}
            y = builder.op("Conv", [codes, weight], "conv", attributes)
        y = builder.op("Mul", [y, values.scale], "rescaled")
        if layer.bias is not None:
            channel = (-1,) if linear else (-1, *(1,) * (len(x.shape) - 2))
            bias = layer.bias.numpy().reshape(channel)
            y = builder.op("Add", [y, builder.constant("bias", bias)], "biased")
        result: ir.Value = y
        return result

    def _quantized(
        self, builder: GraphBuilder, values: StepValues, scaled: ir.Value, x: ir.Value
    ) -> ir.Value:
        if values.quantizer not in self._codes:
            unit = builder.constant("one", np.array(1.0, np.float32))
            zero = builder.constant("zero_fp8", np.array(0, ml_dtypes.float8_e4m3fn))
            y = builder.op("QuantizeLinear", [scaled, unit, zero], "codes")
            y.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            y = builder.op("Cast", [y], "activation", _FLOAT)
            y.shape, y.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
            self._codes[values.quantizer] = y
        return self._codes[values.quantizer]

    @staticmethod
    def _weight(builder: GraphBuilder, layer: Fp8Tensors, *, transposed: bool) -> ir.Value:
        """The numbers of a weight as float: `[N, K, *kernel]`, or `[K, N]` if transposed."""
        packed = layer.weight

        def codes() -> np.ndarray:
            patterns = packed.codes.numpy().view(ml_dtypes.float8_e4m3fn)
            return np.ascontiguousarray(patterns.T) if transposed else patterns

        shape = packed.shape[::-1] if transposed else packed.shape
        stored = builder.weight("weight", codes, shape, ir.DataType.FLOAT8E4M3FN)
        weight: ir.Value = builder.op("Cast", [stored], "weight_float", _FLOAT)
        return weight
