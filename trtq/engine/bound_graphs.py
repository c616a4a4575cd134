"""CUDA graphs of onnxruntime sessions, which need inputs and outputs at fixed addresses.

A captured graph reads and writes the addresses of its capture. With other addresses each later call
would return the first call's result (onnxruntime issue 20050), so each captured shape has tensors of its
own. onnxruntime does not check that a graph is replayed with the shapes of its capture.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtq._optional import require
from trtq.engine.base import TensorSpec
from trtq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRAPH_OPTIONS", "VARIABLE", "CapturedShapes", "Shape", "cuda_graphs_wanted"]

VARIABLE = "TRTQ_CUDA_GRAPHS"
"""Environment variable that switches CUDA graphs on if its value is 1."""
GRAPH_OPTIONS = {
    "cuda": "enable_cuda_graph",
    "tensorrt": "trt_cuda_graph_enable",
    "tensorrt-rtx": "enable_cuda_graph",
}
"""Name of each provider's option."""
_ID = "gpu_graph_id"
"""Run option of onnxruntime's CUDA provider: number of the graph to capture or replay."""
_MAX_SHAPES = {"cuda": 4}
"""Maximum number of captured shapes; providers without an entry have one graph per session."""


def cuda_graphs_wanted() -> bool:
    """Whether the user asks for CUDA graphs.

    Raises:
        UsageError: the variable has another value than 0 or 1, or torch sees no GPU.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise UsageError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    if value != "1":
        return False
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"{VARIABLE}=1 needs tensors at fixed addresses on the GPU, and torch {torch.__version__} "
            f"sees no GPU; install torch for CUDA, or unset {VARIABLE}"
        )
    return True


@dataclass(frozen=True)
class Shape:
    """Tensors of one captured graph.

    Attributes:
        number: number of the graph, from 1.
        inputs: inputs by name.
        outputs: outputs by name.
    """

    number: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass
class CapturedShapes:
    """The captured graphs of one session.

    Attributes:
        provider: provider of the session.
        slot: the binding of all calls.
    """

    provider: str
    slot: Any = None
    _shapes: dict[tuple[tuple[int, ...], ...], Shape] = field(default_factory=dict)

    def shape_of(self, tensors: Mapping[str, Tensor]) -> Shape | None:
        """The graph for inputs of these shapes, if it was added."""
        return self._shapes.get(_key(tensors))

    def add(
        self,
        tensors: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
    ) -> Shape:
        """Reserve a graph's tensors.

        Args:
            tensors: inputs, of which only shapes and types are used.
            outputs: the outputs whose shapes are known.
            specs: all outputs.

        Raises:
            UsageError: the provider captures no further shape, or an output's shape is not known.
        """
        largest = _MAX_SHAPES.get(self.provider, 1)
        if len(self._shapes) >= largest:
            raise UsageError(
                f"with CUDA graphs a session of {self.provider} runs {largest} input shape"
                f"{'s' if largest > 1 else ''}; unset {VARIABLE} to run more"
            )
        unknown = [name for name in specs if name not in outputs]
        if unknown:
            raise UsageError(
                f"the shape of the output {unknown[0]!r} does not follow from the inputs' shapes, which "
                f"CUDA graphs need; unset {VARIABLE}"
            )
        inputs = {name: value.new_empty(value.shape) for name, value in tensors.items()}
        shape = Shape(len(self._shapes) + 1, inputs, dict(outputs))
        self._shapes[_key(tensors)] = shape
        return shape

    def options_of(self, shape: Shape) -> Any:
        """Run options that name the graph."""
        options = require("onnxruntime").RunOptions()
        if self.provider in _MAX_SHAPES:
            options.add_run_config_entry(_ID, str(shape.number))
        return options


def _key(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(value.shape) for value in tensors.values())
