"""What a fine-tuning method needs from its training points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

__all__ = ["Points"]

P = TypeVar("P")


class Points(Protocol[P]):
    """A source of points at which student and teacher are compared.

    A point has the attributes `timestep`, `[B]`, `teacher`, the teacher's prediction, `[B, ...]`, and
    `weight`, the weight of an error, `[B]`.
    """

    @property
    def streams(self) -> Sequence[int]:
        """Random streams, one per micro-batch of an update in this process."""

    def next(self, slot: int, iteration: int) -> P:
        """The next point of a micro-batch's trajectory.

        Args:
            slot: index of the micro-batch in the update.
            iteration: index of the update.
        """

    def predict(self, student: Callable[..., Any], batch: P) -> Tensor:
        """The student's prediction at a point, with the shape of the teacher's.

        Args:
            student: callable that computes the student's prediction.
            batch: the point.
        """

    def state(self) -> dict[str, Tensor]:
        """The state of the current trajectories."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the trajectories of `state`."""
