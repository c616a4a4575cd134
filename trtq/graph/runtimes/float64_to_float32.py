"""Casts float64 to float32, for runtimes without float64.

1. Every Cast to DOUBLE becomes a Cast to FLOAT.
2. Every DOUBLE constant becomes a FLOAT constant.

The statistics of norms are then summed in float32. The only effect is that a few more values fall on the
other side of a rounding tie.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["CastFloat64ToFloat32"]


class CastFloat64ToFloat32(ir.passes.InPlacePass):
    """Turn every Cast to DOUBLE and every DOUBLE constant into FLOAT, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Cast to DOUBLE and every DOUBLE constant."""
        modified = False
        for node in model.graph:
            to = node.attributes.get("to")
            if to is not None and to.as_int() == ir.DataType.DOUBLE.value:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
                modified = True
            for value in node.outputs:
                if value.dtype == ir.DataType.DOUBLE:
                    value.dtype = ir.DataType.FLOAT
        for value in model.graph.initializers.values():
            data = value.const_value
            if data is not None and data.dtype == ir.DataType.DOUBLE:
                value.const_value = ir.tensor(data.numpy().astype(np.float32), name=value.name)
                value.dtype = ir.DataType.FLOAT
                modified = True
        return ir.passes.PassResult(model, modified=modified)
