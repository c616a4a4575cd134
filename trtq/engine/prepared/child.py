"""A child process that rewrites a graph, so that the parent need not load onnx and torch."""

from __future__ import annotations

import sys
from pathlib import Path

from trtq.child import error_record, write_answer
from trtq.engine.prepared.graph import OnCpu, PreparedGraph, prepare_in_process
from trtq.errors import ArtefactError, TrtqError
from trtq.processes import Child, ChildDiedError

__all__ = ["prepare_by_child"]

_GRAPH_FILE = "graph.onnx"
"""The rewritten graph, in the folder of the answer's file; the answer is the graph's record."""
_SECONDS = 1800.0


def prepare_by_child(path: Path, runtime: OnCpu) -> PreparedGraph:
    """Rewrite a graph in a child process.

    Args:
        path: file of the exported graph.
        runtime: runtime that is to run the graph.

    Returns:
        The rewritten graph.

    Raises:
        ArtefactError: the graph cannot be read or rewritten, or the child died.
    """
    with Child(__name__, path.resolve(), runtime) as child:
        try:
            record = child.answer(_SECONDS)
            model = (child.answer_file.parent / _GRAPH_FILE).read_bytes()
            graph = PreparedGraph.of_record(model, record)
            if graph is None:
                raise ChildDiedError(child.wait())
        except TimeoutError as err:
            raise ArtefactError(
                f"rewriting {path} for {runtime} took more than {_SECONDS:.0f} s and was ended"
            ) from err
        except ChildDiedError as err:
            raise ArtefactError(err.exit.explain(f"the process that rewrites {path}")) from err
    return graph


def main() -> int:
    """Run in the child; arguments: graph, runtime, answer's file. Return 0 if a graph was written."""
    path, answer_file = Path(sys.argv[1]), Path(sys.argv[3])
    runtime: OnCpu = "openvino" if sys.argv[2] == "openvino" else "onnxruntime"
    try:
        graph = prepare_in_process(path, runtime)
    except TrtqError as err:
        write_answer(answer_file, error_record(err))
        return 1
    (answer_file.parent / _GRAPH_FILE).write_bytes(graph.model)
    write_answer(answer_file, graph.record())
    return 0
