"""Files of a graph: the graph with small tensors, and a second file with the large tensors."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trtq.artefact.manifest import Manifest
from trtq.errors import NonFiniteError

__all__ = [
    "DATA_NAME",
    "ENGINE_FILE",
    "INLINE_BYTES",
    "MODEL_FILE",
    "graphs_of",
    "model_file",
    "save_graph",
    "save_rewritten",
]

MODEL_FILE = "model.onnx"
DATA_NAME = "model.onnx_data"
INLINE_BYTES = 1 << 14
"""Tensors below this size, in bytes, stay in the graph, since shape inference reads the sizes of splits
only there."""


def model_file(folder: Path) -> Path:
    """Path of the engine in a component's folder, else of the graph, which may not exist."""
    engine = folder / ENGINE_FILE
    return engine if engine.is_file() else folder / MODEL_FILE


def graphs_of(manifest: Manifest, file: str = MODEL_FILE) -> list[str]:
    """The folders of an artefact's graphs or engines, sorted.

    Args:
        manifest: manifest of the artefact.
        file: `MODEL_FILE` for graphs, `ENGINE_FILE` for engines.

    Returns:
        Names of the folders, relative to the artefact.
    """
    paths = [PurePosixPath(name) for name in manifest.files]
    return sorted(str(p.parent) for p in paths if p.name == file and len(p.parts) == 2)


def save_graph(model: Any, folder: Path) -> None:
    """Write an `onnx_ir` model into a new folder.

    Raises:
        NonFiniteError: a constant contains NaN or infinity; the message names it.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    # The rewrites leave unused constants in the graph.
    RemoveUnusedNodesPass()(model)
    _drop_export_notes(model)
    _check_finite(model)
    folder.mkdir(parents=True)
    ir.save(model, folder / MODEL_FILE, external_data=DATA_NAME, size_threshold_bytes=INLINE_BYTES)
    onnx.checker.check_model(str(folder / MODEL_FILE))


def save_rewritten(model: Any, folder: Path) -> None:
    """Write an `onnx_ir` model that was rewritten for a runtime into an existing folder."""
    import onnx_ir as ir

    ir.save(model, folder / MODEL_FILE, external_data=DATA_NAME, size_threshold_bytes=INLINE_BYTES)


def _drop_export_notes(model: Any) -> None:
    """Drop the metadata of nodes from torch's exporter: source lines with paths of this machine.

    The metadata make up more than half of a small graph's file, and nothing reads them.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            node.metadata_props.clear()
            for output in node.outputs:
                output.metadata_props.clear()


def _check_finite(model: Any) -> None:
    for name, value in model.graph.initializers.items():
        data = value.const_value
        if data is None or not np.issubdtype(data.dtype.numpy(), np.floating):
            continue
        if not np.isfinite(data.numpy()).all():
            raise NonFiniteError(f"the exported graph contains NaN or infinity in {name!r}")


ENGINE_FILE = "model.engine"
