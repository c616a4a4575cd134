"""Graphs that another model of the same Triton Inference Server runs, called from its Python backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtq.engine.base import TensorSpec
from trtq.errors import ServerError

__all__ = ["ServedGraph", "TritonEngine"]


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
            "inputs": {name: _plain(spec) for name, spec in self.inputs.items()},
            "outputs": {name: _plain(spec) for name, spec in self.outputs.items()},
            "metadata": dict(self.metadata),
            "batched": self.batched,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ServedGraph:
        """From what `to_json` gave."""
        inputs, outputs = (
            {name: TensorSpec(np.dtype(one[0]), tuple(one[1])) for name, one in found[key].items()}
            for key in ("inputs", "outputs")
        )
        return cls(found["model"], inputs, outputs, found["metadata"], found["batched"])


def _plain(spec: TensorSpec) -> list[Any]:
    return [spec.dtype.name, list(spec.shape)]


class TritonEngine:
    """A graph that the server runs.

    Args:
        graph: the model that holds it.
        backend_utils: the server's module `triton_python_backend_utils`.
    """

    provider = "triton"

    def __init__(self, graph: ServedGraph, backend_utils: Any) -> None:
        self._graph = graph
        self._utils = backend_utils

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs by name."""
        return self._graph.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs by name."""
        return self._graph.outputs

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the graph's file says about itself."""
        return self._graph.metadata

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first.

        Raises:
            ServerError: the model answered with an error.
        """
        items = max(len(value) for value in feeds.values())
        request = self._utils.InferenceRequest(
            model_name=self._graph.model,
            requested_output_names=list(self.outputs),
            inputs=[
                self._utils.Tensor(name, self._shaped(value, items))
                for name, value in feeds.items()
            ],
        )
        response = request.exec()
        if response.has_error():
            raise ServerError(f"{self._graph.model}: {response.error().message()}")
        return {
            name: self._array(self._utils.get_output_tensor_by_name(response, name))
            for name in self.outputs
        }

    def _shaped(self, value: np.ndarray, items: int) -> np.ndarray:
        """In a batched model every item has its own value, and none of them is without an axis."""
        if not self._graph.batched:
            return value
        if len(value) == 1 < items:
            value = value.repeat(items, axis=0)
        return value[:, None] if value.ndim == 1 else value

    @staticmethod
    def _array(tensor: Any) -> np.ndarray:
        if tensor.is_cpu():
            found: np.ndarray = tensor.as_numpy()
            return found
        from torch.utils.dlpack import from_dlpack

        return from_dlpack(tensor.to_dlpack()).cpu().numpy()
