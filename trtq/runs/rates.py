"""The learning rates of a fine-tuning stage, and the decay of its branches."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from trtq.calib.recipe import Training

if TYPE_CHECKING:
    from trtq.train.distill import BranchDecay, Rates

__all__ = ["branch_of", "rates_of", "warn_of_large_updates"]

logger = logging.getLogger(__name__)

_LARGE_UPDATE = 0.2
"""Largest movement of an adapter's entry, in weight levels per iteration, without a warning. On a small
transformer at W4A4, 100 iterations with 0.32 levels ended below the result without fine-tuning, with
0.16 levels above it."""


def rates_of(training: Training, iterations: int, weight_travel: float) -> Rates:
    """The learning rates: with linear decay a value moves by at most `rate * iterations / 2`.

    Args:
        training: the recipe's training.
        iterations: number of updates of the stage.
        weight_travel: number of weight levels that a tuned weight moves by.
    """
    from trtq.train.distill import Rates

    return Rates(
        lora=2 * training.lora_travel / iterations,
        weight_scale=training.weight_scale_lr,
        activation=training.activation_lr,
        activation_relative=training.activation_lr_relative,
        tuned=2 * weight_travel / iterations,
    )


def branch_of(training: Training, iterations: int) -> BranchDecay | None:
    """The decay of the branches next to the weights; None: no branches.

    Args:
        training: the recipe's training.
        iterations: number of updates of the stage.
    """
    from trtq.train.distill import BranchDecay

    # The last update is one without branches.
    last = min(round(training.branch_share * iterations), iterations - 1)
    return BranchDecay(training.branch_rank, last) if training.branch_rank and last > 0 else None


def warn_of_large_updates(training: Training, iterations: int, label: str = "") -> None:
    """Warn if the adapters move so far per iteration that the fine-tuning may do harm.

    Args:
        training: the recipe's training.
        iterations: number of updates of the stage that trains the adapters.
        label: text before the message, e.g. the denoiser's name.
    """
    update = 2 * training.lora_travel / iterations
    if training.rank == 0 or update <= _LARGE_UPDATE:
        return
    logger.warning(
        "%sthe adapters move by up to %.2g weight levels per iteration (2 * training.lora_travel / "
        "iterations = 2 * %g / %d); above %g the result can be worse than without fine-tuning. Raise "
        "the number of iterations to %d, or lower training.lora_travel to %g",
        label,
        update,
        training.lora_travel,
        iterations,
        _LARGE_UPDATE,
        math.ceil(round(training.iterations * update / _LARGE_UPDATE, 6)),
        math.floor(10 * training.lora_travel * _LARGE_UPDATE / update) / 10,
    )
