"""What every runtime looks like from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from trtq.artefact.graph_metadata import SIZES_KEY
from trtq.errors import ArtefactError

__all__ = ["NO_METADATA", "SIZES_KEY", "Engine", "TensorSpec", "only_output"]

NO_METADATA: Mapping[str, str] = MappingProxyType({})
"""Of a graph that says nothing about itself."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        dtype: numpy's.
        shape: sizes; a name where the size is free.
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int | str, ...]


class Engine(Protocol):
    """A graph that can be run."""

    @property
    def provider(self) -> str:
        """Name of what runs it, as `--provider` takes it."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The graph's inputs by name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The graph's outputs by name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the graph's file says about itself."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by name, batch first."""


def only_output(engine: Engine) -> str:
    """The name of a denoiser's prediction.

    Raises:
        ArtefactError: the graph gives nothing, or several things.
    """
    names = list(engine.outputs)
    if len(names) != 1:
        raise ArtefactError(
            f"the graph of a denoiser has one output, this one has {', '.join(names) or 'none'}"
        )
    return names[0]
