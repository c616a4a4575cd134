"""A graph's or an engine's file as the engine of a provider."""

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
    """Open an ONNX file, or an engine of TensorRT.

    Args:
        path: the graph, with its external data beside it; or the engine.
        provider: one of `trtq.engine.ort.PROVIDERS`; of an engine, its backend.
        threads: threads of one operator; None: as many as there are cores.
        metadata: of an engine, which has none of its own.
        profile: gives the ranges of a graph's inputs, for the TensorRT providers of onnxruntime.
        shapes: of inputs that are kept ready where each has to be compiled.

    Raises:
        UsageError: the provider is unknown or not in the installed onnxruntime.
        ArtefactError: the file cannot be loaded, or the graph holds a loop.
    """
    if path.name == ENGINE_FILE:
        return open_tensorrt(path, provider, metadata)
    _refuse_loops(path)
    if provider in BACKENDS:
        if profile is None:
            raise UsageError(f"{path} does not say what shapes {provider} is to build for")
        return OrtTensorRtEngine(path, provider, profile(), threads)
    if provider == OpenVinoEngine.provider:
        return OpenVinoEngine(path, threads, shapes)
    return OrtEngine(path, provider, threads)


_LOOP = b'"\x04Loop'
"""`op_type: "Loop"` of a node in a serialized graph: field 4, a text of four bytes."""


def _refuse_loops(path: Path) -> None:
    """Refuse a graph that holds a Loop, which trtq never exports.

    A call that never ends cannot be interrupted: runtimes do not return to Python, not even for Ctrl-C.

    Raises:
        ArtefactError: it holds one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
            found = graph.find(_LOOP) >= 0
    except (OSError, ValueError):  # The runtime says what is wrong with the file.
        return
    if found:
        raise ArtefactError(
            f"{path} holds a Loop, which may never end and which trtq never exports; export it again: "
            "trtq export RUN -o ONNX"
        )
