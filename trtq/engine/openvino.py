"""Graphs on onnxruntime's OpenVINO provider, compiled for each shape they are called with.

With free shapes OpenVINO loses most of what integers gain, so every shape of inputs gets a session of
its own at its first call; the latest few are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trtq.engine.base import TensorSpec
from trtq.engine.ort import check_provider, open_graph, session_options
from trtq.export.targets import load_graph, prepare

__all__ = ["MOST_SHAPES", "OpenVinoEngine", "graph_specs"]

MOST_SHAPES = 2
"""Shapes that are kept compiled unless more are asked for."""

_NAME: Literal["openvino"] = "openvino"
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoEngine:
    """An ONNX file in one OpenVINO session per shape of its inputs.

    Args:
        path: the graph; its external data lie beside it.
        threads: of one inference; None: as many as there are cores.
        most_shapes: sessions kept; each holds the weights in memory.

    Shapes that have been called with may be run while another thread compiles a new one.

    Raises:
        UsageError: the installed onnxruntime has no OpenVINO.
        ArtefactError: the file cannot be read.
    """

    provider = _NAME

    def __init__(
        self, path: Path, threads: int | None = None, most_shapes: int = MOST_SHAPES
    ) -> None:
        check_provider(_NAME)
        self._path = path
        self._threads = threads
        self.most_shapes = most_shapes
        self._model = prepare(load_graph(path), _NAME)
        graph = self._model.graph
        self._inputs = graph_specs(graph.inputs)
        self._outputs = graph_specs(graph.outputs)
        # Shapes of the general graph would contradict those of a fixed one.
        for value in [*graph.outputs, *(value for node in graph for value in node.outputs)]:
            value.shape = None
        self._sessions: OrderedDict[_Shapes, Any] = OrderedDict()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs by name."""
        return self._outputs

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the graph's file says about itself."""
        found: Mapping[str, str] = self._model.metadata_props
        return found

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first.

        Raises:
            UsageError: OpenVINO cannot start on this machine.
            ArtefactError: it cannot load the graph.
        """
        shapes = tuple((name, feeds[name].shape) for name in self._inputs)
        session = self._sessions.get(shapes)
        if session is None:
            session = self._sessions[shapes] = self._open(shapes)
            while len(self._sessions) > self.most_shapes:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(shapes)
        names = list(self._outputs)
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def _open(self, shapes: _Shapes) -> Any:
        import onnx_ir as ir
        from onnxruntime import GraphOptimizationLevel

        fixed = dict(shapes)
        for value in self._model.graph.inputs:
            value.shape = ir.Shape(fixed[value.name or ""])
        options = session_options(self._threads)
        # OpenVINO does its own fusions, and finds fewer of them after onnxruntime's.
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
        settings = {"device_type": "CPU", "precision": "FP32"}
        if self._threads is not None:
            settings["num_of_threads"] = str(self._threads)
        return open_graph(self._path, self._model, options, _NAME, settings)


def graph_specs(values: Any) -> dict[str, TensorSpec]:
    """Inputs or outputs of an `onnx_ir` graph by name."""
    return {
        value.name: TensorSpec(
            value.dtype.numpy(),
            tuple(size if isinstance(size, int) else str(size) for size in value.shape),
        )
        for value in values
    }
