"""Casts the indices of GatherND and ScatterND to int64, the only type that ONNX allows.

torch's exporter passes indices on in the type that the model has, e.g. int32 positions.
"""

from __future__ import annotations

import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["CastIndicesToInt64"]

_INDEXED = ("GatherND", "ScatterND")


class CastIndicesToInt64(ir.passes.InPlacePass):
    """Cast the indices of GatherND and ScatterND, see the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires on every GatherND and ScatterND whose indices come in another type."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type in _INDEXED and _is_narrow(node.inputs[1])]
        for index, node in enumerate(nodes):
            build = GraphBuilder(graph, f"indices_{index}")
            indices = node.inputs[1]
            wide = build.op("Cast", [indices], "wide", {"to": ir.DataType.INT64.value})
            wide.shape, wide.type = indices.shape, ir.TensorType(ir.DataType.INT64)  # type: ignore[union-attr]
            node.replace_input_with(1, wide)
            graph.insert_before(node, build.nodes)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_narrow(value: ir.Value | None) -> bool:
    """Whether the type of an index is not int64; an unknown type counts as narrow."""
    return value is not None and value.dtype != ir.DataType.INT64
