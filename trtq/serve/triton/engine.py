"""Graphs that run as other models of a Triton server, called from its Python backend."""

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
    """The signature of a model that runs a graph.

    Attributes:
        model: name of the model in the server.
        inputs: specifications of the inputs by name.
        outputs: specifications of the outputs by name.
        metadata: metadata of the graph's file.
        batched: whether the server may batch calls; if so, the first axis of every input is the batch.
    """

    model: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    batched: bool

    def to_json(self) -> dict[str, Any]:
        """The signature as JSON, for `from_json`."""
        return {
            "model": self.model,
            "inputs": specs_to_json(self.inputs),
            "outputs": specs_to_json(self.outputs),
            "metadata": dict(self.metadata),
            "batched": self.batched,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ServedGraph:
        """Read the result of `to_json`.

        Raises:
            ArtefactError: the document is malformed.
        """
        try:
            inputs, outputs = (specs_from_json(document[key]) for key in ("inputs", "outputs"))
            return cls(
                str(document["model"]),
                inputs,
                outputs,
                dict(document["metadata"]),
                bool(document["batched"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            raise ArtefactError(f"{shown(document)} does not describe a graph: {err}") from err


class TritonEngine(Engine):
    """An engine whose graph is run by another model of the server.

    Args:
        graph: signature of that model.
        backend_utils: module `triton_python_backend_utils` of the server.
        before_run: callback before each run; an exception that it raises ends the request.
    """

    def __init__(
        self, graph: ServedGraph, backend_utils: Any, before_run: Callable[[], None] | None = None
    ) -> None:
        super().__init__("triton", graph.inputs, graph.outputs, graph.metadata)
        self._graph = graph
        self._utils = backend_utils
        self._before_run = before_run

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once.

        Args:
            feeds: arrays by name, batch first.

        Returns:
            The outputs by name.

        Raises:
            ServerError: the model returned an error.
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
        """Reshape an input for a batched model: one value per item, at least two axes."""
        if not self._graph.batched:
            return value
        if len(value) == 1 < items:
            value = value.repeat(items, axis=0)
        return value[:, None] if value.ndim == 1 else value


# Both functions use torch's DLPack. Arrays that Triton 2.51 exchanges with NumPy 2 directly have wrong
# strides: every item is the first item, or the tensor is empty. NumPy 1.26's DLPack ends the process,
# since the server renames a capsule in a way that only torch supports.


def tensor_of(backend_utils: Any, name: str, value: np.ndarray) -> Any:
    """Create a tensor of the server with the values of an array.

    Args:
        backend_utils: module `triton_python_backend_utils` of the server.
        name: name of the tensor.
        value: values of the tensor.
    """
    whole = np.require(value, requirements=["C", "W"])  # torch warns about read-only arrays.
    return backend_utils.Tensor.from_dlpack(name, torch.from_numpy(whole))


def array_of(tensor: Any) -> np.ndarray:
    """Copy the values of a tensor of the server, on any device, to an array."""
    array: np.ndarray = from_dlpack(tensor.to_dlpack()).cpu().numpy()
    return array
