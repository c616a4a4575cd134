"""QuEST (arXiv 2402.03666): selective, progressive fine-tuning of the quantised model, without data.

Two stages tune some of the original weights and all activation scales:

    1  the time-embedding projections           sum_l || O_l - O~_l ||^2 + L_G      (eq. 4 and 6)
    2  the attention-related layers             sum_l || O_l - O~_l ||^2 + L_G      (eq. 5 and 6)

`O_l` is the output of a tuned layer in the float model and `O~_l` its output in the quantised model,
each for the layer's inputs in the same model. `L_G` is the error of the final output. Weight scales and
zero points stay fixed. With learned rounding (`trtq.quant.adaround`) the direction stays frozen while
the weight changes.

The two losses are weighted in one of three ways: as in the paper, with one global term; as in the
released code, which adds the global term once per tuned layer; or with the global term alone, as in
stage 2 of the released unconditional and ImageNet models.

Differences from the released code:

- At 4 bits the authors use one activation scale per input channel and step, which an integer product
  cannot compute; here there is one scale per tensor and step.
- With guidance the authors compare both halves of the batch; here the guided outputs are compared, in
  which the unconditional half has weight `(guidance - 1)^2`.
- The authors' rates are constant; here they decay linearly to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from trtq.quant.hooks import captured_outputs
from trtq.quant.part import QuantizedPart
from trtq.train.distill import BranchDecay, Distillation, Rates
from trtq.train.points import Points

__all__ = ["Quest", "Weighting", "alignment_loss"]

Weighting = Literal["paper", "released", "global"]


def alignment_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    student_output: Tensor,
    teacher_output: Tensor,
    weighting: Weighting = "paper",
    global_weight: float = 1.0,
    item_weight: Tensor | None = None,
) -> Tensor:
    """Sum of the local terms of K layers and the global term; each term is a mean of squares.

    Args:
        student: outputs of the layers in the quantised model, by name, `[B, ...]`; with guidance
            `[2 B, ...]`.
        teacher: outputs of the layers in the float model, by name, same shapes.
        student_output: output of the quantised model, `[B, ...]`.
        teacher_output: output of the float model, `[B, ...]`.
        weighting: `paper`: `local + w * global`; `released`: `local + K * w * global`; `global`:
            `K * w * global`.
        global_weight: weight `w` of the global term.
        item_weight: weights of the items, `[B]`; None: 1 for all items.
    """
    task = global_weight * _mean_square(student_output, teacher_output, item_weight)
    if weighting == "global":
        return len(teacher) * task
    local = sum(
        (
            _mean_square(student[name].float(), output, item_weight)
            for name, output in teacher.items()
        ),
        task.new_zeros(()),
    )
    return local + (len(teacher) if weighting == "released" else 1) * task


def _mean_square(student: Tensor, teacher: Tensor, item_weight: Tensor | None) -> Tensor:
    if item_weight is None:
        return functional.mse_loss(student, teacher)
    error = (student - teacher).square().flatten(1).mean(1)
    return (error * item_weight.repeat(len(error) // len(item_weight))).mean()


class Quest(Distillation):
    """One stage of the method as an `Objective` of `trtq.train.loop`.

    Args:
        model: quantised denoiser, both teacher and student; `QuantLayer.tune` has been called on the
            tuned layers.
        trajectories: source of the points at which teacher and student are compared.
        rates: learning rates.
        tuned: paths of the layers whose weights are trained.
        aligned: paths of the layers whose outputs are compared; None: the tuned layers.
        activations: paths of the activation quantisers that are trained.
        adapters: whether to also train the QALoRA adapters of all layers that have adapters.
        weighting: see `alignment_loss`.
        global_weight: see `alignment_loss`.
        branch: see `Distillation`.
    """

    def __init__(
        self,
        model: QuantizedPart,
        trajectories: Points[Any],
        rates: Rates,
        *,
        tuned: Collection[str],
        activations: Collection[str],
        aligned: Collection[str] | None = None,
        adapters: bool = False,
        weighting: Weighting = "paper",
        global_weight: float = 1.0,
        branch: BranchDecay | None = None,
    ) -> None:
        super().__init__(model, trajectories, rates, branch)
        self.tuned = set(tuned)
        self.aligned = self.tuned if aligned is None else set(aligned)
        self.activations = set(activations)
        self.adapters = adapters
        self.weighting: Weighting = weighting
        self.global_weight = global_weight

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of tuned weights, optional adapters, and activation entries."""
        layers = dict(self.model.layers())
        groups = self.tuned_groups(layers[name] for name in sorted(self.tuned))
        if self.adapters:
            groups += self.adapter_groups(layers.values())
        return groups + self.activation_groups(self.activations)

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """Local and global error at the current points of this slot's trajectories."""
        with captured_outputs(self.model.denoiser, self.aligned) as outputs:
            batch = self.trajectories.next(slot, iteration)
            teacher = dict(outputs)
            predicted = self.trajectories.predict(student, batch)
        return alignment_loss(
            outputs,
            teacher,
            predicted.float(),
            batch.teacher,
            self.weighting,
            self.global_weight,
            batch.weight,
        )
