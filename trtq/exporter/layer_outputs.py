"""Outputs of the low-bit layers of a graph, for comparisons layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trtq.engine.ort import input_specs, open_graph, session_options
from trtq.errors import ArtefactError
from trtq.graph.passes.step_lookup import STEP_NAME
from trtq.graph.runtimes.prepare import load_graph, prepare

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["layer_outputs", "looked_up_steps"]


def looked_up_steps(path: Path, sample: str, timesteps: Tensor) -> Tensor | None:
    """The step index that an exported graph looks up for each timestep.

    Only the look-up is run, so the cost does not depend on the size of the graph.

    Args:
        path: file of the graph, in one folder with its external data.
        sample: name of the graph's input of samples.
        timesteps: timesteps, float `[B]`.

    Returns:
        Step indices, int64 `[B]`; None if nothing in the graph depends on the step.

    Raises:
        ArtefactError: the graph cannot be loaded.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = load_graph(path)
    graph = model.graph
    looked_up = [node.outputs[0] for node in graph if node.outputs[0].name == STEP_NAME]
    if not looked_up:
        return None
    graph.outputs[:] = looked_up
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    session = open_graph(path, model, session_options(None), "cpu", {})
    feeds = {}
    for name, spec in input_specs(session).items():
        fixed = [size if isinstance(size, int) else 1 for size in spec.shape[1:]]
        shape = (len(timesteps), *fixed) if name == sample else (len(timesteps),)
        feeds[name] = np.zeros(shape, spec.dtype)
    feeds["timestep"] = timesteps.numpy().astype(feeds["timestep"].dtype)
    (steps,) = session.run([STEP_NAME], feeds)
    return torch.from_numpy(steps)


def layer_outputs(
    path: Path, layers: Sequence[str], feeds: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run an exported graph once on onnxruntime's CPU provider, and return the outputs of its layers.

    Args:
        path: file of the graph, in one folder with its external data.
        layers: names of low-bit layers.
        feeds: inputs by name.

    Returns:
        The output of each layer by name, in float32.

    Raises:
        ArtefactError: the graph cannot be loaded, or has no such layer.
    """
    model = prepare(load_graph(path), "onnxruntime")
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        layer = (node.name or "").rpartition("/")[0]
        last[layer] = node.outputs[0]
    missing = [name for name in layers if name not in last]
    if missing:
        raise ArtefactError(f"{path} has no layer {missing[0]!r}")
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(last[name] for name in layers if last[name] not in outputs)
    session = open_graph(path, model, session_options(None), "cpu", {})
    arrays = {
        name: np.atleast_1d(feeds[name].numpy()).astype(spec.dtype)
        for name, spec in input_specs(session).items()
    }
    names = [last[name].name for name in layers]
    values = session.run(names, arrays)
    return {
        name: torch.from_numpy(value).float() for name, value in zip(layers, values, strict=True)
    }
