"""Folds 4-bit weights into int8 constants, for compilers that support INT4 in few places.

1. `Sub(Cast(INT4 codes, INT8), zero point)` of constants becomes one int8 constant.

In TensorRT only DequantizeLinear and plugins accept INT4, so graphs for TensorRT contain int8 until they
are built; rule 6 of `ExpandLowBitToQdq` describes the form in the file.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["CastInt4ToInt8"]


class CastInt4ToInt8(ir.passes.InPlacePass):
    """Fold 4-bit codes and their zero point into one int8 constant, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every such Sub of constants."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "Sub"]:
            integers = self._integers(node)
            if integers is None:
                continue
            name = f"{node.name}/constant"
            value = ir.Value(
                name=name,
                shape=ir.Shape(list(integers.shape)),
                type=ir.TensorType(ir.DataType.INT8),
                const_value=ir.tensor(integers, name=name),
            )
            cast = node.inputs[0].producer()  # type: ignore[union-attr]
            graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            if cast is not None and not cast.outputs[0].uses():
                graph.remove(cast, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _integers(node: ir.Node) -> np.ndarray | None:
        """The difference `codes - zero point`, int8; None if the node does not match."""
        widened, zero_point = node.inputs
        cast = widened.producer() if widened is not None else None
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
            return None
        codes = cast.inputs[0].const_value
        offset = zero_point.const_value if zero_point is not None else None
        if codes is None or offset is None or codes.dtype != ir.DataType.INT4:
            return None
        integers: np.ndarray = codes.numpy().astype(np.int8) - offset.numpy()
        return integers
