"""Adds nodes to a graph that look up the denoising step from the timestep: one per batch item, or one.

1. `step[b]` is the number of edges in the timestep table that are <= `timestep[b]`:
   Expand -> Unsqueeze -> GreaterOrEqual(edges) -> Cast -> ReduceSum -> Cast(int64).
2. With one step per call, the noisiest timestep of the call counts:
   Cast(float) -> Reshape(-1) -> ReduceMax -> GreaterOrEqual(edges) -> Cast -> ReduceSum -> Cast(int64).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtq.errors import LegalityError
from trtq.graph.passes.builder import GraphBuilder
from trtq.quant.timestep import TimestepTable

__all__ = ["STEPS_PREFIX", "STEP_NAME", "StepInput", "look_up_step"]

STEPS_PREFIX = "steps"
STEP_NAME = f"{STEPS_PREFIX}/step"
"""Name of the value that holds the step index of each item."""


@dataclass(frozen=True)
class StepInput:
    """The graph input that determines the step.

    Attributes:
        name: name of the input.
        per_item: whether each batch item has its own step. Rows of a layer's input need not be batch
            items (frames, tokens), and a pipeline's call has one step; then one step per call is right.
        rows: name of an input whose first axis is the batch; None: the first input.
    """

    name: str = "timestep"
    per_item: bool = True
    rows: str | None = None

    def rows_input(self, graph: ir.Graph) -> ir.Value:
        """The input whose first axis is the batch."""
        if self.rows is None:
            return graph.inputs[0]
        return next(value for value in graph.inputs if value.name == self.rows)


_TIMESTEP = StepInput()


def look_up_step(
    graph: ir.Graph, table: TimestepTable, timestep: StepInput = _TIMESTEP
) -> ir.Value:
    """Insert the nodes that look up the step at the beginning of a graph, unless it has them already.

    Args:
        graph: the graph. With one step per item, the input of timesteps is float32 `[B]`, or `[1]` for
            all items; with one step per call, it has any shape and any numeric type.
        table: the calibrated timesteps.
        timestep: the input that determines the step.

    Returns:
        The step index of each item, int64 `[B]`; with one step per call, int64 `[1]`.

    Raises:
        LegalityError: the graph has no such input.
    """
    for node in graph:
        if node.outputs[0].name == STEP_NAME:
            return node.outputs[0]
    inputs = {value.name: value for value in graph.inputs}
    if timestep.name not in inputs:
        raise LegalityError(
            f"the graph has no input {timestep.name!r} for the timestep; its inputs are "
            f"{', '.join(map(repr, inputs))}"
        )
    builder = GraphBuilder(graph, STEPS_PREFIX)
    edges = builder.constant("edges", table.edges.numpy()[None])
    last = builder.constant("axis_1", np.array([1], np.int64))
    value = inputs[timestep.name]
    if timestep.per_item:
        batch = builder.op("Shape", [timestep.rows_input(graph)], "batch", {"start": 0, "end": 1})
        expanded = builder.op("Expand", [value, batch], "timestep")
        column = builder.op("Unsqueeze", [expanded, last], "column")
    else:
        column = _noisiest(builder, value)
    passed = builder.op("GreaterOrEqual", [column, edges], "passed")
    ones = builder.op("Cast", [passed], "ones", {"to": ir.DataType.FLOAT.value})
    count = builder.op("ReduceSum", [ones, last], "count", {"keepdims": 0})
    step: ir.Value = builder.op("Cast", [count], "step", {"to": ir.DataType.INT64.value})
    graph.insert_before(graph[0], builder.nodes)
    return step


def _noisiest(builder: GraphBuilder, timestep: ir.Value) -> ir.Value:
    """The largest timestep of a call, float32 `[1]`."""
    if timestep.dtype != ir.DataType.FLOAT:
        timestep = builder.op("Cast", [timestep], "float", {"to": ir.DataType.FLOAT.value})
    row = builder.constant("row", np.array([-1], np.int64))
    flat = builder.op("Reshape", [timestep, row], "timesteps")
    value: ir.Value = builder.op("ReduceMax", [flat], "timestep", {"keepdims": 1})
    return value
