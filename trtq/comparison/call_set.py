"""What the comparison needs of the denoiser calls at which two sides are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from trtq.engine.base import TensorSpec

__all__ = ["CallSet", "Feeds", "Outputs"]

Feeds = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class CallSet(ABC):
    """Calls of a denoiser with one set of inputs.

    Attributes:
        feeds: inputs of each call by name.
        timesteps: timestep of each call; None for a call whose items are at different steps.
        steps: index of the step of each item of a mixed call, 0 = noisiest; None for the other calls.
        few_images: whether a call has so few images that one of them may be set aside, and the floor
            needs several patterns, see `trtq.exporter.call_parity.tensor_parity`.
    """

    feeds: list[Feeds]
    timesteps: Sequence[float | None]
    steps: Sequence[list[int] | None]
    few_images: ClassVar[bool] = False

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The inputs by name; every axis is free."""
        return {
            name: TensorSpec(array.dtype, tuple(f"{name}_{axis}" for axis in range(array.ndim)))
            for name, array in self.feeds[0].items()
        }

    @property
    def channels(self) -> int | None:
        """Entries of axis 1 of an output that are compared; None: all."""
        return None

    @abstractmethod
    def call(self, denoiser: Any, feeds: Feeds) -> Outputs:
        """Call a denoiser in torch.

        Args:
            denoiser: a diffusers model, or a low-bit one.
            feeds: inputs by name, those of one of the calls.

        Returns:
            The outputs by their names in a graph.
        """

    @abstractmethod
    def few(self, max_images: int) -> Self:
        """The calls with fewer images each, if their images can be chosen.

        Args:
            max_images: maximum number of images of a small size.
        """

    @abstractmethod
    def only(self, index: int) -> Self:
        """The call with this index alone."""
