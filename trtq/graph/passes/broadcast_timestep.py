"""Let one timestep serve the whole batch."""

from __future__ import annotations

import onnx_ir as ir

from trtq.graph.passes.builder import GraphBuilder

__all__ = ["BroadcastTimestep"]


class BroadcastTimestep(ir.passes.InPlacePass):
    """Accept `timestep` as `[1]` as well as `[batch]`: expand it to the batch of the first input.

    Tracing ties both lengths together; callers like diffusers give one timestep for all items.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fires once; a graph whose timestep has an axis of its own is left alone."""
        graph = model.graph
        sample = graph.inputs[0]
        (timestep,) = (value for value in graph.inputs if value.name == "timestep")
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
