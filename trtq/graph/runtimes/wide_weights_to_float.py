"""Computes layers with 8-bit weights in float, for processors whose integer products saturate.

1. `DequantizeLinear(int8 W, ones)` becomes `Cast(W)` if W has integers beyond `PAIR_SAFE`. Weights of
   weight-only layers do not change.

Without VNNI, x86 adds two uint8 x int8 products in int16, which saturates. The layer is then computed in
float from the same integers, with the same result. The weights remain int8, since a graph of more than
two gigabytes cannot be passed to the runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.errors import LegalityError
from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.low_bit_to_qdq import PAIR_SAFE
from trtq.graph.runtimes.weight_only import is_weight_only

__all__ = ["WideWeightsToFloat"]


class WideWeightsToFloat(ir.passes.InPlacePass):
    """Replace DequantizeLinear by Cast for weights beyond `PAIR_SAFE`, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on weights stored as int8 with integers beyond `PAIR_SAFE`.

        Raises:
            LegalityError: such a weight has a scale other than 1, or a zero point.
        """
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
            weight = node.inputs[0]
            stored = weight.const_value if weight is not None else None
            if weight is None or stored is None or stored.dtype != ir.DataType.INT8:
                continue
            if is_weight_only(node):
                continue
            integers = stored.numpy()
            if np.abs(integers.astype(np.int16)).max() <= PAIR_SAFE:
                continue
            scale = node.inputs[1].const_value if node.inputs[1] is not None else None
            if len(node.inputs) > 2 or scale is None or not bool((scale.numpy() == 1).all()):
                raise LegalityError(
                    f"the weight of {node.name!r} is scaled before the product, not after it"
                )
            build = GraphBuilder(graph, f"{node.name}/wide")
            y = build.op("Cast", [weight], "float", {"to": ir.DataType.FLOAT.value})
            (out,) = node.outputs
            y.shape, y.type = out.shape, out.type
            ir.convenience.replace_nodes_and_values(graph, node, [node], build.nodes, [out], [y])
            modified = True
        return ir.passes.PassResult(model, modified=modified)
