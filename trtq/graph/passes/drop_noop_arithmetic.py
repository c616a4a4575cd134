"""Removes arithmetic that changes nothing.

1. `x + 0`, `x - 0`, `x * 1` and `x / 1` with a constant of one value are replaced by `x`.

The constant has to be exactly 0 or 1. onnxscript's rules of the same kind take every constant below 1e-8
for 0, and so remove the term that keeps a denominator from being 0, e.g. `1e-15` in Sana's attention.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["DropNoopArithmetic"]

_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
_COMMUTES = ("Add", "Mul")


class DropNoopArithmetic(ir.passes.InPlacePass):
    """Remove additions of 0 and products with 1, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every such node whose constant has no more axes than `x`."""
        graph = model.graph
        modified = False
        for node in [n for n in graph if n.op_type in _NEUTRAL and not n.domain]:
            first, second = node.inputs
            x = None
            if _is_exactly(second, _NEUTRAL[node.op_type]):
                x = _unchanged(first, second)
            elif node.op_type in _COMMUTES and _is_exactly(first, _NEUTRAL[node.op_type]):
                x = _unchanged(second, first)
            if x is None:
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], x, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_exactly(value: ir.Value | None, number: int) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and tensor.numpy().reshape(-1)[0] == number


def _unchanged(x: ir.Value | None, constant: ir.Value | None) -> ir.Value | None:
    """`x` if a broadcast with the constant does not add axes to it, else None."""
    if x is None or constant is None or constant.shape is None:
        return None
    axes = len(constant.shape)
    return x if axes == 0 or (x.shape is not None and len(x.shape) >= axes) else None
