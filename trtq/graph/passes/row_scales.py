"""Nodes that compute one scale per row of an activation in the graph.

    Abs -> ReduceMax over the row -> Max(smallest range) -> Mul(1 / qmax) [-> Min(s[step])]

See `trtq.quant.dynamic_scale` for what a row is, and for the policies.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.dynamic_scale import SMALLEST_RANGE, RowAxis, largest_code

__all__ = ["row_axis_of", "row_scale_nodes"]


def row_axis_of(operand: str, *, conv: bool) -> RowAxis:
    """What a row is, for the input of this name of a layer or of a product of activations."""
    if conv:
        return "image"
    return "second_last" if operand == "right" else "last"


def row_scale_nodes(
    builder: GraphBuilder,
    x: ir.Value,
    prefix: str,
    *,
    bits: int,
    axis: RowAxis,
    limit: ir.Value | None,
) -> ir.Value:
    """The scale of each row of a float32 value, with size 1 along the axes within a row.

    Args:
        builder: builder of the layer.
        x: activation, float32, of known rank.
        prefix: prefix of the nodes' names.
        bits: width of the codes.
        axis: what a row is.
        limit: largest scale at the step of each item; None: no limit.
    """
    assert x.shape is not None
    rank = len(x.shape)
    axes = {"last": [-1], "second_last": [-2], "image": list(range(1, rank))}[axis]
    shared = GraphBuilder(builder.graph, builder.prefix, "row_scales")
    reduced = shared.constant(f"axes_{axis}_{rank}", np.array(axes, np.int64))
    smallest = shared.constant("smallest_range", np.array(SMALLEST_RANGE, np.float32))
    unit = shared.constant(f"reciprocal_{bits}", np.array(1 / largest_code(bits), np.float32))
    y = builder.op("Abs", [x], f"{prefix}magnitude")
    y = builder.op("ReduceMax", [y, reduced], f"{prefix}row_max", {"keepdims": 1})
    y = builder.op("Max", [y, smallest], f"{prefix}row_range")
    y = builder.op("Mul", [y, unit], f"{prefix}row_scale")
    if limit is not None:
        y = builder.op("Min", [y, limit], f"{prefix}row_scale_limited")
    scale: ir.Value = y
    return scale
