"""The step of every batch item, found in the graph from its timestep."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.timestep import TimestepTable

__all__ = ["STEPS_PREFIX", "STEP_NAME", "look_up_step"]

STEPS_PREFIX = "steps"
STEP_NAME = f"{STEPS_PREFIX}/step"
"""The index of each item's step in a graph of ours."""


def look_up_step(graph: ir.Graph, table: TimestepTable) -> ir.Value:
    """`step = number of edges <= timestep`, int64[B]; one timestep may stand for all items.

    Puts it at the beginning of the graph, unless another rewrite has done so already.
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
