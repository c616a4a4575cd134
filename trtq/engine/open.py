"""Opening the file of a graph or an engine with a provider."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

from trtq.engine.base import NO_METADATA, Engine
from trtq.engine.openvino import MAX_SHAPES, OpenVinoEngine
from trtq.engine.ort import OrtEngine
from trtq.engine.ort_tensorrt import OrtTensorRtEngine
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.job import Profile
from trtq.engine.tensorrt.run import open_tensorrt
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import ENGINE_FILE

__all__ = ["open_engine"]


def open_engine(
    path: Path,
    provider: str = "cpu",
    threads: int | None = None,
    metadata: Mapping[str, str] = NO_METADATA,
    profile: Callable[[], Profile] | None = None,
    shapes: int = MAX_SHAPES,
) -> Engine:
    """Open an ONNX file or an engine of TensorRT.

    Args:
        path: file of the graph, in one folder with its external data; or file of the engine.
        provider: one of `trtq.engine.ort.PROVIDERS`; for an engine, its backend.
        threads: threads of one operator; None: the number of cores.
        metadata: metadata of an engine, whose file has none.
        profile: function that returns the ranges of a graph's inputs; for the TensorRT providers of
            onnxruntime.
        shapes: number of compiled input shapes to keep, for providers that compile each shape.

    Returns:
        The opened engine, ready to run.

    Raises:
        UsageError: the provider is unknown or not installed.
        ArtefactError: the file cannot be loaded, or the graph contains a loop.
    """
    if path.name == ENGINE_FILE:
        return open_tensorrt(path, provider, metadata)
    _refuse_loops(path)
    if provider in BACKENDS:
        if profile is None:
            raise UsageError(f"{path} does not specify the shapes that {provider} builds for")
        return OrtTensorRtEngine(path, provider, profile(), threads)
    if provider == OpenVinoEngine.provider:
        return OpenVinoEngine(path, threads, shapes)
    return OrtEngine(path, provider, threads)


_LOOP = b'"\x04Loop'
"""`op_type: "Loop"` of a node in a serialised graph: field 4, a text of four bytes."""


def _refuse_loops(path: Path) -> None:
    """Raise if a graph contains a Loop, which trtq never exports.

    An endless call cannot be interrupted: runtimes do not return to Python, not even on Ctrl-C.

    Raises:
        ArtefactError: the graph contains a Loop.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
            has_loop = graph.find(_LOOP) >= 0
    except (OSError, ValueError):  # The runtime reports what is wrong with the file.
        return
    if has_loop:
        raise ArtefactError(
            f"{path} holds a Loop, which may never end and which trtq never exports; export it again: "
            "trtq export RUN -o ONNX"
        )
