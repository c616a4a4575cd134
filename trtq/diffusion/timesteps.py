"""The timesteps that a scheduler visits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.scheduler_rules import (
    SCHEDULER_ERRORS,
    first_line,
    has_aligned_sigmas,
    quiet_scheduler,
    scheduler_name,
    scheduler_refusal,
    trained_steps,
)
from trtq.errors import UsageError

__all__ = ["checked_timesteps", "set_timesteps", "visited_timesteps"]


def set_timesteps(scheduler: Any, steps: int) -> Any:
    """A fresh copy of a scheduler with its timesteps set by their number alone.

    Args:
        scheduler: scheduler of diffusers; it is not changed.
        steps: number of denoising steps.

    Raises:
        UsageError: the number of steps is out of range, or the scheduler rejects its settings, e.g.
            since its timesteps depend on the image size.
    """
    trained = trained_steps(scheduler)
    if not 1 <= steps <= trained:
        raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
    try:
        with quiet_scheduler():
            fresh = type(scheduler).from_config(scheduler.config)
            fresh.set_timesteps(num_inference_steps=steps)
    except SCHEDULER_ERRORS as err:
        reason = f"gives no timesteps for steps={steps} ({first_line(err)})"
        raise scheduler_refusal(scheduler, reason) from err
    checked_timesteps(fresh, steps)
    return fresh


def checked_timesteps(stepped: Any, steps: int, *, flow: bool | None = None) -> Tensor:
    """The timesteps of a scheduler, float64, in order.

    Args:
        stepped: scheduler whose timesteps are set.
        steps: number of denoising steps.
        flow: see `scheduler_refusal`.

    Raises:
        UsageError: a timestep is not finite, or outside of the training schedule.
    """
    timesteps = torch.as_tensor(stepped.timesteps).double()
    if not len(timesteps) or not bool(torch.isfinite(timesteps).all()):
        reason = f"gives timesteps for steps={steps} that are not finite numbers"
        raise scheduler_refusal(stepped, reason, flow=flow)
    trained, noisiest = trained_steps(stepped), float(timesteps.max())
    if hasattr(stepped, "alphas_cumprod") and (noisiest >= trained or float(timesteps.min()) < 0):
        wrong = noisiest if noisiest >= trained else float(timesteps.min())
        raise UsageError(
            f"steps={steps} is out of range: {scheduler_name(stepped)} would visit timestep "
            f"{wrong:g}, but the model was trained on 0 .. {trained - 1}; choose fewer steps"
        )
    return timesteps


def visited_timesteps(stepped: Any) -> tuple[Tensor, Tensor | None]:
    """Distinct timesteps and their noise levels.

    Args:
        stepped: known scheduler whose timesteps are set.

    Returns:
        Timesteps, float32[T], noisiest first; the scheduler's sigma of each, float32[T], or None if the
        scheduler defines none.

    Raises:
        UsageError: the first timestep is not the noisiest.
    """
    listed = torch.as_tensor(stepped.timesteps).float().cpu()
    if float(listed[0]) != float(listed.max()):
        raise scheduler_refusal(stepped, "does not start at its noisiest timestep")
    # Second-order solvers list a timestep twice, once per evaluation, or return to an earlier one;
    # steps close together may share a timestep.
    first: dict[float, int] = {}
    for position, timestep in enumerate(listed.tolist()):
        first.setdefault(timestep, position)
    timesteps = sorted(first, reverse=True)
    sigmas = None
    if has_aligned_sigmas(stepped):
        all_sigmas = torch.as_tensor(stepped.sigmas).float().cpu()
        sigmas = all_sigmas[torch.tensor([first[t] for t in timesteps])]
    return torch.tensor(timesteps), sigmas
