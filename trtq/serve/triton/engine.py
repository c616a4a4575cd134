"""Graphs that another model of the same Triton Inference Server runs, called from its Python backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from trtq.documents import shown
from trtq.engine.base import Engine, TensorSpec, specs_from_json, specs_to_json
from trtq.errors import ArtefactError, ServerError

__all__ = ["ServedGraph", "TritonEngine", "array_of", "tensor_of"]


@dataclass(frozen=True)
class ServedGraph:
    """What has to be known of a model to call it.

    Attributes:
        model: its name in the server.
        inputs: by name.
        outputs: by name.
        metadata: of the graph's file.
        batched: whether the server may put calls together; then every input has a batch axis first.
    """

    model: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    batched: bool

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "model": self.model,
            "inputs": specs_to_json(self.inputs),
            "outputs": specs_to_json(self.outputs),
            "metadata": dict(self.metadata),
            "batched": self.batched,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ServedGraph:
        """From what `to_json` gave.

        Raises:
            ArtefactError: it is something else.
        """
        try:
            inputs, outputs = (specs_from_json(found[key]) for key in ("inputs", "outputs"))
            return cls(
                str(found["model"]),
                inputs,
                outputs,
                dict(found["metadata"]),
                bool(found["batched"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            raise ArtefactError(f"{shown(found)} describes no graph: {err}") from err


class TritonEngine(Engine):
    """A graph that the server runs.

    Args:
        graph: the model that holds it.
        backend_utils: the server's module `triton_python_backend_utils`.
        before_run: called before each run; what it raises ends the drawing.
    """

    def __init__(
        self, graph: ServedGraph, backend_utils: Any, before_run: Callable[[], None] | None = None
    ) -> None:
        super().__init__("triton", graph.inputs, graph.outputs, graph.metadata)
        self._graph = graph
        self._utils = backend_utils
        self._before_run = before_run

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first.

        Raises:
            ServerError: the model answered with an error.
        """
        if self._before_run is not None:
            self._before_run()
        items = max(len(value) for value in feeds.values())
        request = self._utils.InferenceRequest(
            model_name=self._graph.model,
            requested_output_names=list(self.outputs),
            inputs=[
                tensor_of(self._utils, name, self._shaped(value, items))
                for name, value in feeds.items()
            ],
        )
        response = request.exec()
        if response.has_error():
            raise ServerError(f"{self._graph.model}: {response.error().message()}")
        return {
            name: array_of(self._utils.get_output_tensor_by_name(response, name))
            for name in self.outputs
        }

    def _shaped(self, value: np.ndarray, items: int) -> np.ndarray:
        """In a batched model every item has its own value, and none of them is without an axis."""
        if not self._graph.batched:
            return value
        if len(value) == 1 < items:
            value = value.repeat(items, axis=0)
        return value[:, None] if value.ndim == 1 else value


# Both by torch's DLPack. What Triton 2.51 gives to and takes from NumPy 2 directly has the wrong
# strides: every item is the first one, or the tensor is empty. With NumPy 1.26's own DLPack the
# process ends, since the server renames a capsule in a way that only torch bears.


def tensor_of(backend_utils: Any, name: str, value: np.ndarray) -> Any:
    """The server's tensor of an array of numbers."""
    whole = np.require(value, requirements=["C", "W"])  # torch warns of what it may not write.
    return backend_utils.Tensor.from_dlpack(name, torch.from_numpy(whole))


def array_of(tensor: Any) -> np.ndarray:
    """The numbers of a tensor of the server's, on whatever device it lies."""
    found: np.ndarray = from_dlpack(tensor.to_dlpack()).cpu().numpy()
    return found
