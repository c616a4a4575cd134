"""Training points of a pipeline whose noise levels are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from trtq.calib.recipe import Recipe
from trtq.diffusion.sampling import Conditions
from trtq.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trtq.train.points import Points

__all__ = ["scheduled_points"]


def scheduled_points(
    teacher: Callable[..., Any],
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    draw_conditions: Callable[[int, torch.Generator], Conditions],
    recipe: Recipe,
    accelerator: Accelerator,
) -> Callable[[str], AbstractContextManager[Points[Any]]]:
    """A function that opens the training points of a stage, see `FineTuning.trajectories`.

    Args:
        teacher: float denoiser.
        schedule: noise schedule of the teacher's trajectory.
        shape: shape of one sample, (C, H, W).
        draw_conditions: function `(count, generator) -> Conditions` that draws random conditions.
        recipe: recipe with a training.
        accelerator: accelerator of this process.
    """
    from trtq.train.trajectories import Trajectories

    training = recipe.training
    assert training is not None

    def opened(purpose: str) -> AbstractContextManager[Points[Any]]:
        points = Trajectories(
            teacher,
            schedule,
            shape,
            draw_conditions,
            batch=training.batch,
            slots=training.accumulate,
            stream=accelerator.process_index,
            stride=accelerator.num_processes,
            seed=recipe.seed,
            purpose=purpose,
            guidance=1.0 if recipe.guidance is None else recipe.guidance,
            eta=training.eta,
            staggered=training.trajectory == "staggered",
            weighted=training.step_weights == "influence",
            device=accelerator.device,
        )
        return nullcontext(points)

    return opened
