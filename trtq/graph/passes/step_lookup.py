"""Adds nodes to a graph that look up the step of every batch item from its timestep.

1. `step[b]` is the number of edges in the timestep table that are <= `timestep[b]`:
   Expand -> Unsqueeze -> GreaterOrEqual(edges) -> Cast -> ReduceSum -> Cast(int64).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.timestep import TimestepTable

__all__ = ["STEPS_PREFIX", "STEP_NAME", "look_up_step"]

STEPS_PREFIX = "steps"
STEP_NAME = f"{STEPS_PREFIX}/step"
"""Name of the value that holds the step index of each item."""


def look_up_step(graph: ir.Graph, table: TimestepTable) -> ir.Value:
    """Insert the nodes that look up the step at the beginning of a graph, unless it has them already.

    Args:
        graph: the graph, whose input `timestep` is `[B]`, or `[1]` for all items.
        table: the calibrated timesteps.

    Returns:
        The step index of each item, int64 `[B]`.
    """
    for node in graph:
        if node.outputs[0].name == STEP_NAME:
            return node.outputs[0]
    builder = GraphBuilder(graph, STEPS_PREFIX)
    inputs = {value.name: value for value in graph.inputs}
    edges = builder.constant("edges", table.edges.numpy()[None])
    batch = builder.op("Shape", [graph.inputs[0]], "batch", {"start": 0, "end": 1})
    timestep = builder.op("Expand", [inputs["timestep"], batch], "timestep")
    last = builder.constant("axis_1", np.array([1], np.int64))
    column = builder.op("Unsqueeze", [timestep, last], "column")
    passed = builder.op("GreaterOrEqual", [column, edges], "passed")
    ones = builder.op("Cast", [passed], "ones", {"to": ir.DataType.FLOAT.value})
    count = builder.op("ReduceSum", [ones, last], "count", {"keepdims": 0})
    step: ir.Value = builder.op("Cast", [count], "step", {"to": ir.DataType.INT64.value})
    graph.insert_before(graph[0], builder.nodes)
    return step
