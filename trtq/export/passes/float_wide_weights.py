"""Weights beyond seven bits as float, for processors whose integer products saturate."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.errors import LegalityError
from trtq.export.passes.expand_qdq import PAIR_SAFE

__all__ = ["FloatWideWeights"]


class FloatWideWeights(ir.passes.InPlacePass):
    """Replace DequantizeLinear of a constant int8 weight with larger integers than `PAIR_SAFE`.

    Without VNNI, x86 adds two uint8 x int8 products in int16, which saturates. The layer is then
    computed in float from the same whole numbers, to the same result.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on weights stored as int8.

        Raises:
            LegalityError: such a weight has a scale or zero point of its own.
        """
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
            stored = node.inputs[0].const_value if node.inputs[0] is not None else None
            if stored is None or stored.dtype != ir.DataType.INT8:
                continue
            integers = stored.numpy()
            if np.abs(integers.astype(np.int16)).max() <= PAIR_SAFE:
                continue
            scale = node.inputs[1].const_value if node.inputs[1] is not None else None
            if len(node.inputs) > 2 or scale is None or not bool((scale.numpy() == 1).all()):
                raise LegalityError(
                    f"the weight of {node.name!r} is scaled before its product, not behind it"
                )
            (out,) = node.outputs
            name = f"{node.name}/constant"
            data = ir.tensor(integers.astype(np.float32), name=name)
            value = ir.Value(
                name=name,
                shape=ir.Shape(list(integers.shape)),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=data,
            )
            graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(out, value)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
