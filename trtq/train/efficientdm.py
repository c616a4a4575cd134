"""EfficientDM (arXiv 2310.03270): QALoRA and per-step scales, distilled without data.

    loss = sum || student(x_t, t) - teacher(x_t, t) ||^2        (eq. 7, summed as released)

on the guided predictions, at points of the teacher's own trajectory.

Two rates are not what they were in the release's 16,000 iterations: the recipes let an adapter entry
travel 8 or 16 weight levels where it can travel 3.2 there, since they are shorter; and weight steps, at
the released rate of 1e-6, hardly move in so few iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trtq.train.distill import Distillation

__all__ = ["EfficientDM", "guided_error"]


def guided_error(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of squared differences of two guided predictions (EfficientDM, eq. 7, as released).

    Args:
        student: `[B, ...]`.
        teacher: the same shape.
        weight: of each item, `[B]`; by default 1.
    """
    error = (student - teacher).square()
    return error.sum() if weight is None else (error.flatten(1).sum(1) * weight).sum()


class EfficientDM(Distillation):
    """The method as an `Objective` of `trtq.train.loop`."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapters per layer, weight steps, and activation entries of the layers with adapters.

        Layers without adapters (8 bits) are left as calibrated, as released; products of attention
        have no weights and are trained.
        """
        layers = {name: layer for name, layer in self.model.layers() if layer.lora_A is not None}
        paths = {f"{name}.activation" for name in layers}
        for name, _ in self.model.products():
            paths |= {f"{name}.left", f"{name}.right"}
        return [*self.adapter_groups(layers.values()), *self.activation_groups(paths)]

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """The squared error where the trajectories of this slot stand."""
        batch = self.trajectories.next(slot, iteration)
        predicted = self.trajectories.predict(student, batch)
        return guided_error(predicted.float(), batch.target, batch.weight)
