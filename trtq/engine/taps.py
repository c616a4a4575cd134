"""What every low-bit layer of a graph gives, for comparisons layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trtq.engine.ort import input_specs, open_graph, session_options
from trtq.errors import ArtefactError
from trtq.export.targets import load_graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["layer_outputs"]


def layer_outputs(
    path: Path, layers: Sequence[str], feeds: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run a graph of ours once on onnxruntime's CPU provider.

    Args:
        path: the graph; its external data lie beside it.
        layers: low-bit layers by name.
        feeds: inputs by name.

    Returns:
        Each layer's output, in float32.

    Raises:
        ArtefactError: the graph cannot be loaded, or has no such layer.
    """
    model = load_graph(path)
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        layer = (node.name or "").rpartition("/")[0]
        last[layer] = node.outputs[0]
    missing = [name for name in layers if name not in last]
    if missing:
        raise ArtefactError(f"{path} has no layer {missing[0]!r}")
    own = list(model.graph.outputs)
    model.graph.outputs.extend(last[name] for name in layers if last[name] not in own)
    session = open_graph(path, model, session_options(None), "cpu", {})
    arrays = {
        name: np.atleast_1d(feeds[name].numpy()).astype(spec.dtype)
        for name, spec in input_specs(session).items()
    }
    names = [last[name].name for name in layers]
    found = session.run(names, arrays)
    return {
        name: torch.from_numpy(value).float() for name, value in zip(layers, found, strict=True)
    }
