"""Makes a graph accept one timestep for the whole batch.

1. The input `timestep[batch]` becomes `timestep[timesteps]`, and every use of it becomes a use of
   `Expand(timestep, Shape(first input)[0:1])`.

Tracing ties the length of `timestep` to the batch, but callers such as diffusers pass one timestep for
all items.
"""

from __future__ import annotations

import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder
from trtq.graph.passes.step_lookup import StepInput

__all__ = ["BroadcastTimestep"]

_TIMESTEP = StepInput()


class BroadcastTimestep(ir.passes.InPlacePass):
    """Accept a timestep `[1]` as well as `[batch]`, see the module docstring.

    Args:
        timestep: the input of timesteps, one per item.
    """

    def __init__(self, timestep: StepInput = _TIMESTEP) -> None:
        super().__init__()
        self.timestep = timestep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires once per graph, unless the timestep already has a separate axis."""
        graph = model.graph
        sample = self.timestep.rows_input(graph)
        (timestep,) = (value for value in graph.inputs if value.name == self.timestep.name)
        assert timestep.shape is not None
        if str(timestep.shape[0]) == "timesteps":
            return ir.passes.PassResult(model, modified=False)
        builder = GraphBuilder(graph, "timestep")
        batch = builder.op("Shape", [sample], "batch", {"start": 0, "end": 1})
        expanded = builder.op("Expand", [timestep, batch], "expanded")
        expanded.shape, expanded.type = ir.Shape([sample.shape[0]]), timestep.type  # type: ignore[index]
        ir.convenience.replace_all_uses_with(timestep, expanded)
        expanded.producer().replace_input_with(0, timestep)
        graph.insert_before(graph[0], builder.nodes)
        timestep.shape = ir.Shape(["timesteps"])
        return ir.passes.PassResult(model, modified=True)
