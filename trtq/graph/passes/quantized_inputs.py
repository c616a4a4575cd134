"""Inputs of low-bit layers in the graph: transformed, divided by their scale, clipped and quantised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.row_scales import row_axis_of, row_scale_nodes
from trtq.graph.passes.step_values import StepValues
from trtq.quant.tensors import ActivationTensors

__all__ = ["QuantizedInputs"]

_FLOAT = {"to": ir.DataType.FLOAT.value}


class QuantizedInputs:
    """Adds the nodes of quantised inputs to a graph; inputs that are quantised alike share them."""

    def __init__(self) -> None:
        self._scaled: dict[str, ir.Value] = {}
        self._codes: dict[str, ir.Value] = {}
        self._floats: dict[tuple[str, bool], ir.Value] = {}
        self._row_scales: dict[str, ir.Value] = {}

    def operand(
        self,
        builder: GraphBuilder,
        x: ir.Value,
        values: StepValues,
        tensors: ActivationTensors,
        operand: str,
        *,
        paired: bool,
        conv: bool = False,
    ) -> ir.Value:
        """The codes of an input as float numbers.

        Args:
            builder: builder of the layer.
            x: the input.
            values: values of the input at the step of each item.
            tensors: tensors of the input's quantiser.
            operand: name of the input within the layer.
            paired: whether the codes are dequantised; otherwise they are cast.
            conv: whether the layer is a convolution.
        """
        prefix = _prefix(operand)
        key = values.quantizer, paired
        if key not in self._floats:
            unit = builder.constant("one", np.array(1.0, np.float32))
            zero = builder.constant("zero", np.array(0, np.int8))
            if values.quantizer not in self._codes:
                y = self.scaled(builder, x, values, tensors, operand, conv=conv)
                self._codes[values.quantizer] = builder.op(
                    "QuantizeLinear", [y, unit, zero], f"{prefix}codes"
                )
            codes = self._codes[values.quantizer]
            if paired:
                y = builder.op("DequantizeLinear", [codes, unit, zero], f"{prefix}activation")
            else:
                y = builder.op("Cast", [codes], f"{prefix}activation", _FLOAT)
            # Later rewrites need the rank.
            y.shape, y.type = x.shape, ir.TensorType(ir.DataType.FLOAT)
            self._floats[key] = y
        return self._floats[key]

    def scaled(
        self,
        builder: GraphBuilder,
        x: ir.Value,
        values: StepValues,
        tensors: ActivationTensors,
        operand: str = "activation",
        *,
        conv: bool = False,
    ) -> ir.Value:
        """An input divided by its scale, and clipped; arguments as for `operand`."""
        prefix = _prefix(operand)
        if values.quantizer not in self._scaled:
            if x.dtype != ir.DataType.FLOAT:
                shape = x.shape
                x = builder.op("Cast", [x], f"{prefix}float", _FLOAT)
                x.shape, x.type = shape, ir.TensorType(ir.DataType.FLOAT)
            inverse = values.inv_scale
            if tensors.policy != "step":
                axis = row_axis_of(operand, conv=conv)
                scale = row_scale_nodes(
                    builder, x, prefix, bits=tensors.bits, axis=axis, limit=values.scale
                )
                self._row_scales[values.quantizer] = scale
                inverse = builder.op("Reciprocal", [scale], f"{prefix}inverse_row_scale")
            y: ir.Value = builder.op("Mul", [x, inverse], f"{prefix}scaled")
            if values.low is not None and values.high is not None:
                y = builder.op("Max", [y, values.low], f"{prefix}clip_low")
                y = builder.op("Min", [y, values.high], f"{prefix}clip_high")
            self._scaled[values.quantizer] = y
        return self._scaled[values.quantizer]

    def scale(self, values: StepValues) -> ir.Value | None:
        """The scale of an input that was quantised: of its rows if these have one, else of its step."""
        return self._row_scales.get(values.quantizer, values.scale)


def _prefix(operand: str) -> str:
    return "" if operand == "activation" else f"{operand}_"
