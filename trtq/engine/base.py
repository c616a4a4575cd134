"""The interface that every runtime offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from trtq.artefact.graph_metadata import SIZES_KEY
from trtq.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NO_METADATA",
    "SIZES_KEY",
    "Engine",
    "TensorSpec",
    "check_names",
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

    @property
    def device(self) -> str:
        """Torch's name of the device on which `run_tensors` leaves its outputs."""
        return "cpu"

    def run_tensors(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph once on tensors of torch.

        Args:
            feeds: a tensor for each input, by name, of any device; it is converted to the input's type.

        Returns:
            The outputs by name, on `device`: new tensors, which belong to the caller.

        Raises:
            UsageError: an input is missing, unknown or empty.
        """
        from trtq.engine.arrays import run_on_arrays

        return run_on_arrays(self, feeds)


def check_names(inputs: Iterable[str], feeds: Iterable[str]) -> None:
    """Raise unless a call gives exactly the inputs of a graph.

    Args:
        inputs: names of the graph's inputs.
        feeds: names of the inputs that the call gives.

    Raises:
        UsageError: an input is missing or unknown.
    """
    expected, given = list(inputs), set(feeds)
    missing = [name for name in expected if name not in given]
    unknown = sorted(given.difference(expected))
    if missing or unknown:
        what = f"needs the input {missing[0]!r}" if missing else f"has no input {unknown[0]!r}"
        raise UsageError(f"the graph {what}; it takes {', '.join(expected) or 'none'}")


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
