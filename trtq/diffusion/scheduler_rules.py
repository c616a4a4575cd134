"""The schedulers that trtq supports, and the message for the others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trtq.checkpoint.quiet import quiet_diffusers
from trtq.errors import UsageError

__all__ = [
    "CLIPPING_SCHEDULERS",
    "FLOW_SCHEDULERS",
    "KNOWN_SCHEDULERS",
    "SCHEDULER_ERRORS",
    "check_known",
    "first_line",
    "has_aligned_sigmas",
    "quiet_scheduler",
    "scheduler_name",
    "scheduler_refusal",
    "trained_steps",
    "used_settings",
]

# True if `sigmas[i]` is the noise level at `timesteps[i]`. Otherwise the level is computed from the
# cumulative alphas.
_DIFFUSION_SCHEDULERS = {
    "DDIMParallelScheduler": False,
    "DDIMScheduler": False,
    "DDPMParallelScheduler": False,
    "DDPMScheduler": False,
    "DEISMultistepScheduler": True,
    "DPMSolverMultistepScheduler": True,
    "DPMSolverSDEScheduler": False,
    "DPMSolverSinglestepScheduler": True,
    "EulerAncestralDiscreteScheduler": True,
    "EulerDiscreteScheduler": True,
    "HeunDiscreteScheduler": True,
    "KDPM2AncestralDiscreteScheduler": False,
    "KDPM2DiscreteScheduler": False,
    "LCMScheduler": False,
    "LMSDiscreteScheduler": True,
    "PNDMScheduler": False,
    "TCDScheduler": False,
    "UniPCMultistepScheduler": True,
}
FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": True,
    "FlowMatchHeunDiscreteScheduler": True,
    "FlowMatchLCMScheduler": True,
}
KNOWN_SCHEDULERS = tuple(sorted(_DIFFUSION_SCHEDULERS | FLOW_SCHEDULERS))
"""diffusers' schedulers whose timesteps and noise levels have a known closed form."""
CLIPPING_SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
)
SCHEDULER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def quiet_scheduler() -> Iterator[None]:
    """Suppress diffusers' messages about its own code and about deprecated settings."""
    with quiet_diffusers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scheduler_name(scheduler: Any) -> str:
    """Class name of a scheduler."""
    return type(scheduler).__name__


def has_aligned_sigmas(scheduler: Any) -> bool:
    """Whether `sigmas[i]` of a known scheduler is the noise level at `timesteps[i]`."""
    return (_DIFFUSION_SCHEDULERS | FLOW_SCHEDULERS)[scheduler_name(scheduler)]


def scheduler_refusal(
    scheduler: Any, reason: str, *, flow: bool | None = None, advice: str | None = None
) -> UsageError:
    """The error about an unsupported scheduler.

    Args:
        scheduler: scheduler of diffusers.
        reason: rest of the sentence "the scheduler X ...".
        flow: whether a scheduler of flow matching is recommended; None: of the same kind.
        advice: remedy; None: a recommendation of another scheduler.
    """
    if advice is None:
        name = scheduler_name(scheduler)
        flow = name in FLOW_SCHEDULERS if flow is None else flow
        other = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        if other == name:
            advice = f"change its settings, or use the defaults of {other}()"
        else:
            replacement = f"{other}.from_config(pipe.scheduler.config)"
            advice = f"use another scheduler, e.g. pipe.scheduler = {replacement}"
    return UsageError(f"the scheduler {scheduler_name(scheduler)} {reason}; {advice}")


def used_settings(scheduler: Any) -> dict[str, Any]:
    """The settings that the scheduler's class accepts.

    A scheduler that was created from another scheduler's configuration also keeps the other scheduler's
    settings without using them.
    """
    accepted = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in accepted}


def first_line(err: Exception) -> str:
    """Class and first line of an error."""
    lines = str(err).strip().splitlines() or [""]
    return f"{type(err).__name__}: {lines[0][:200]}"


def trained_steps(scheduler: Any) -> int:
    """Number of timesteps of the training schedule."""
    return int(scheduler.config.get("num_train_timesteps", 1000))


def check_known(scheduler: Any, *, flow: bool | None = None) -> None:
    """Raise unless the timesteps and noise levels of a scheduler are known.

    Args:
        scheduler: scheduler of diffusers.
        flow: see `scheduler_refusal`.

    Raises:
        UsageError: the timesteps or noise levels are unknown; the message lists the supported
            schedulers or settings.
    """
    import diffusers

    name = scheduler_name(scheduler)
    if name not in KNOWN_SCHEDULERS or type(scheduler) is not getattr(diffusers, name, None):
        supported = ", ".join(known.removesuffix("Scheduler") for known in KNOWN_SCHEDULERS)
        reason = f"is not supported (supported: {supported})"
        raise scheduler_refusal(scheduler, reason, flow=flow)
    settings = used_settings(scheduler)
    kind = settings.get("timestep_type", "discrete")
    if kind != "discrete":
        reason = f"has timestep_type={kind!r}; supported is 'discrete'"
        raise scheduler_refusal(scheduler, reason, flow=flow)
    if settings.get("invert_sigmas", False):
        reason = "has invert_sigmas=True, which goes from clean to noisy; set it to False"
        raise scheduler_refusal(scheduler, reason, flow=flow)
