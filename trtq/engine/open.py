"""A graph's file as the engine of a provider."""

from __future__ import annotations

from pathlib import Path

from trtq.engine.base import Engine
from trtq.engine.openvino import MOST_SHAPES, OpenVinoEngine
from trtq.engine.ort import OrtEngine

__all__ = ["open_engine"]


def open_engine(
    path: Path, provider: str = "cpu", threads: int | None = None, shapes: int = MOST_SHAPES
) -> Engine:
    """Open an ONNX file.

    Args:
        path: the graph; its external data lie beside it.
        provider: one of `trtq.engine.ort.PROVIDERS`.
        threads: threads of one operator; None: as many as there are cores.
        shapes: of inputs that are kept ready where each has to be compiled.

    Raises:
        UsageError: the provider is unknown or not in the installed onnxruntime.
        ArtefactError: the file cannot be loaded.
    """
    if provider == OpenVinoEngine.provider:
        return OpenVinoEngine(path, threads, shapes)
    return OrtEngine(path, provider, threads)
