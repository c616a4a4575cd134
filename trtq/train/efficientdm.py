"""EfficientDM (arXiv 2310.03270): QALoRA and per-step scales, distilled without data.

    loss = sum || student(x_t, t) - teacher(x_t, t) ||^2        (eq. 7, summed as released)

for the guided predictions, at points of the teacher's trajectories.

Two learning rates have another effect than in the released code, because the recipes run fewer than its
16,000 iterations. With the recipes an adapter entry can move by up to 8 or 16 weight levels, in the
released code by 3.2. Weight scales have the released rate of 1e-6 and hardly change in so few
iterations.
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
        student: prediction of the quantised model, `[B, ...]`.
        teacher: prediction of the float model, same shape.
        weight: weight of each item, `[B]`; None: 1 for all items.
    """
    error = (student - teacher).square()
    return error.sum() if weight is None else (error.flatten(1).sum(1) * weight).sum()


class EfficientDM(Distillation):
    """EfficientDM as an `Objective` of `trtq.train.loop`."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of adapters, weight scales, and activation entries of layers with adapters.

        Layers without adapters (8 bits) stay as calibrated, as in the released code. Products of
        attention have no weights; their activation entries are trained.
        """
        layers = {name: layer for name, layer in self.model.layers() if layer.lora_A is not None}
        paths = {f"{name}.activation" for name in layers}
        for name, _ in self.model.products():
            paths |= {f"{name}.left", f"{name}.right"}
        return [*self.adapter_groups(layers.values()), *self.activation_groups(paths)]

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """Squared error at the current points of this slot's trajectories."""
        batch = self.trajectories.next(slot, iteration)
        predicted = self.trajectories.predict(student, batch)
        return guided_error(predicted.float(), batch.teacher, batch.weight)
