"""Graphs rewritten for a runtime, once.

`trtq.graph.runtimes.prepare.prepare` needs onnx_ir, onnx and torch. Callers that only open graphs, above
all a server, get the rewritten graph from here and import none of these packages:

1. If onnx_ir is loaded already, the graph is rewritten in this process.
2. Otherwise the graph comes from the user's cache, where the export on this machine or the first call
   has stored it, see `trtq.engine.prepared.cache`.
3. If the cache does not hold it, a child process rewrites the graph, see `trtq.engine.prepared.child`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trtq.engine.prepared.cache import cache_key, read_cache, write_cache
from trtq.engine.prepared.child import prepare_by_child
from trtq.engine.prepared.graph import OnCpu, PreparedGraph, prepare_in_process
from trtq.errors import ArtefactError

__all__ = ["PreparedGraph", "keep_prepared", "prepare_in_process", "prepared_graph"]


def prepared_graph(path: Path, runtime: OnCpu) -> PreparedGraph:
    """Get a graph rewritten for a runtime, without loading onnx or torch into this process.

    Args:
        path: file of the exported graph, in one folder with its external data.
        runtime: runtime that is to run the graph.

    Returns:
        The rewritten graph.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    if "onnx_ir" in sys.modules:
        return prepare_in_process(path, runtime)
    try:
        key = cache_key(path, runtime)
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    graph = read_cache(key)
    if graph is None:
        graph = prepare_by_child(path, runtime)
        write_cache(key, graph)
    return graph


def keep_prepared(path: Path) -> None:
    """Rewrite a graph for the runtimes of this machine, and store the results in the cache if possible.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    runtimes: tuple[OnCpu, ...] = ("onnxruntime", "openvino")
    for runtime in runtimes:
        write_cache(cache_key(path, runtime), prepare_in_process(path, runtime))
