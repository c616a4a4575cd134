"""What every low-bit layer of a graph gives, for comparisons layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trtq.engine.ort import open_session, session_options
from trtq.errors import ArtefactError

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
    import onnx_ir as ir

    model = ir.load(path)
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        layer = (node.name or "").rpartition("/")[0]
        last[layer] = node.outputs[0]
    missing = [name for name in layers if name not in last]
    if missing:
        raise ArtefactError(f"{path} has no layer {missing[0]!r}")
    own = list(model.graph.outputs)
    model.graph.outputs.extend(last[name] for name in layers if last[name] not in own)
    options = session_options(None)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    session = open_session(path, ir.to_proto(model).SerializeToString(), options, "cpu", {})
    wanted = {node.name: node.type for node in session.get_inputs()}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    arrays = {
        name: np.atleast_1d(feeds[name].numpy()).astype(kinds[kind])
        for name, kind in wanted.items()
    }
    names = [last[name].name for name in layers]
    found = session.run(names, arrays)
    return {
        name: torch.from_numpy(value).float() for name, value in zip(layers, found, strict=True)
    }
