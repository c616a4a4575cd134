"""Removes a Squeeze that torch ignores.

1. A Squeeze of one constant axis whose length is known and not 1 is removed.

torch ignores a Squeeze of such an axis, and ONNX forbids it. The exporter writes such a node if a
transformer of diffusers squeezes unconditionally.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["DropNoopSqueeze"]


class DropNoopSqueeze(ir.passes.InPlacePass):
    """Remove a Squeeze of an axis that is longer than 1, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every Squeeze of one constant axis whose length is known and not 1."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type == "Squeeze" and len(n.inputs) == 2]:
            x, axes = node.inputs
            constant = None if axes is None else ir.convenience.get_const_tensor(axes)
            if x is None or x.shape is None or constant is None or constant.size != 1:
                continue
            length = x.shape[int(constant.numpy().reshape(-1)[0])]
            if not isinstance(length, int) or length == 1:
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], x, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
