"""Graphs on onnxruntime's OpenVINO provider, compiled for each shape of the inputs.

With free shapes OpenVINO loses almost all of the speed that integers gain, so each shape of the inputs
gets a session of its own at its first call. The most recently used sessions are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trtq.engine.base import Engine, check_names
from trtq.engine.ort import OrtSession, check_provider, open_serialized, session_options
from trtq.engine.prepared import prepared_graph

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_SHAPES", "OpenVinoEngine"]

MAX_SHAPES = 2
"""Default number of compiled shapes that are kept."""

_NAME: Literal["openvino"] = "openvino"
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoEngine(Engine):
    """An ONNX file in one OpenVINO session per shape of its inputs.

    A compiled shape can be run while another thread compiles a new shape.

    Args:
        path: file of the graph, in one folder with its external data.
        threads: number of threads of one inference; None: the number of cores.
        max_shapes: maximum number of sessions to keep; each holds the weights in memory.

    Raises:
        UsageError: the installed onnxruntime has no OpenVINO.
        ArtefactError: the file cannot be read.
    """

    provider = _NAME

    def __init__(
        self, path: Path, threads: int | None = None, max_shapes: int = MAX_SHAPES
    ) -> None:
        check_provider(_NAME)
        graph = prepared_graph(path, _NAME)
        super().__init__(_NAME, graph.inputs, graph.outputs, graph.metadata)
        self._model = graph.model
        self._path = path
        self._threads = threads
        self.max_shapes = max_shapes
        self._sessions: OrderedDict[_Shapes, OrtSession] = OrderedDict()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once; inputs and outputs are arrays by name, batch first.

        Raises:
            UsageError: OpenVINO cannot start on this machine.
            ArtefactError: OpenVINO cannot load or run the graph.
        """
        return self._session_for(feeds).run(feeds)

    def run_tensors(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph once on tensors of torch, which are bound by their addresses.

        Args:
            feeds: a tensor for each input, by name, of any device.

        Returns:
            The outputs by name, on the host: new tensors, which belong to the caller.

        Raises:
            UsageError: an input is missing, unknown or empty; or OpenVINO cannot start.
            ArtefactError: OpenVINO cannot load or run the graph.
        """
        return self._session_for(feeds).run_tensors(feeds)

    def _session_for(self, feeds: Mapping[str, np.ndarray] | Mapping[str, Tensor]) -> OrtSession:
        """The session for these shapes, which becomes the most recently used one."""
        check_names(self.inputs, feeds)
        shapes = tuple((name, tuple(feeds[name].shape)) for name in self.inputs)
        session = self._sessions.get(shapes)
        if session is None:
            session = self._sessions[shapes] = OrtSession(self._open(shapes), _NAME)
            while len(self._sessions) > self.max_shapes:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(shapes)
        return session

    def _open(self, shapes: _Shapes) -> Any:
        from onnxruntime import GraphOptimizationLevel

        options = session_options(self._threads)
        for name, shape in shapes:
            for axis, size in enumerate(shape):
                options.add_free_dimension_override_by_name(f"{name}.{axis}", size)
        # OpenVINO finds fewer of its own fusions after those of onnxruntime.
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
        settings = {"device_type": "CPU", "precision": "FP32"}
        if self._threads is not None:
            settings["num_of_threads"] = str(self._threads)
        return open_serialized(self._path, self._model, options, _NAME, settings)
