"""The interface that every runtime offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from trtq.artefact.graph_metadata import SIZES_KEY
from trtq.errors import ArtefactError

__all__ = [
    "NO_METADATA",
    "SIZES_KEY",
    "Engine",
    "TensorSpec",
    "graph_specs",
    "only_output",
    "specs_from_json",
    "specs_to_json",
]

NO_METADATA: Mapping[str, str] = MappingProxyType({})
"""Empty metadata, for graphs that have none."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        dtype: numpy's data type.
        shape: size of each axis; a name for a free axis.
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int | str, ...]


class Engine(ABC):
    """A graph that can be run.

    Attributes:
        provider: name of the runtime, a value of `--provider`.
        inputs: the graph's inputs by name.
        outputs: the graph's outputs by name.
        metadata: metadata of the graph's file.
    """

    def __init__(
        self,
        provider: str,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> None:
        self.provider = provider
        self.inputs = inputs
        self.outputs = outputs
        self.metadata = metadata

    @abstractmethod
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once; inputs and outputs are arrays by name, batch first."""


def only_output(engine: Engine) -> str:
    """The name of a denoiser's only output, the prediction.

    Raises:
        ArtefactError: the graph does not have exactly one output.
    """
    names = list(engine.outputs)
    if len(names) != 1:
        raise ArtefactError(
            f"the graph of a denoiser has one output, this one has {', '.join(names) or 'none'}"
        )
    return names[0]


def graph_specs(values: Iterable[Any]) -> dict[str, TensorSpec]:
    """Inputs or outputs of an `onnx_ir` graph by name.

    Raises:
        ArtefactError: a value has no type, or no known rank.
    """
    specs = {}
    for value in values:
        if value.dtype is None or value.shape is None:
            raise ArtefactError(f"{value.name!r} of the graph has no type or no shape")
        sizes = (size if isinstance(size, int) else str(size) for size in value.shape)
        specs[value.name] = TensorSpec(value.dtype.numpy(), tuple(sizes))
    return specs


def specs_to_json(specs: Mapping[str, TensorSpec]) -> dict[str, list[Any]]:
    """Convert specs by name to JSON: `{name: [dtype, sizes]}`."""
    return {name: [spec.dtype.name, list(spec.shape)] for name, spec in specs.items()}


def specs_from_json(record: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Convert the result of `specs_to_json` back to specs by name.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: the record is damaged.
    """
    return {
        name: TensorSpec(np.dtype(dtype), tuple(sizes)) for name, (dtype, sizes) in record.items()
    }
