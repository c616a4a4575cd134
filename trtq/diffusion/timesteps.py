"""The timesteps that a pipeline visits, and a rehearsal of its scheduler."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.scheduler_rules import (
    SCHEDULER_ERRORS,
    check_known,
    first_line,
    has_aligned_sigmas,
    quiet_scheduler,
    scheduler_name,
    scheduler_refusal,
    trained_steps,
    used_settings,
)
from trtq.diffusion.stepping import Stepping
from trtq.errors import UsageError

__all__ = ["check_steps", "inference_timesteps", "set_timesteps", "visited_timesteps"]

_REHEARSALS: dict[tuple[Any, ...], str | None] = {}
_MAX_REHEARSALS = 4096
_UNKNOWN_PIPELINE = Stepping(linear_sigmas=True, shift="dynamic")
_MAX_SCALE_ERROR = 1e-3
"""Maximum deviation of a scale from 1 that counts as "not scaled"."""


def _stepped_copy(scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None) -> Any:
    """A copy of a scheduler, see `set_timesteps`, with unchecked timesteps."""
    trained = trained_steps(scheduler)
    if not 1 <= steps <= trained:
        raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
    config = scheduler.config
    chosen = _UNKNOWN_PIPELINE if stepping is None else stepping
    dynamic = bool(config.get("use_dynamic_shifting", False))
    arguments: dict[str, Any] = {}
    linear = chosen.linear_sigmas and not config.get("use_flow_sigmas", False)
    if linear and (stepping is not None or dynamic):
        # In double precision, as in the pipelines.
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        arguments["sigmas"] = sigmas
    else:
        arguments["num_inference_steps"] = steps
    if chosen.shift == "always" or (chosen.shift == "dynamic" and dynamic):
        if tokens is None:
            raise UsageError(
                f"the timesteps of {scheduler_name(scheduler)} with use_dynamic_shifting depend on "
                "the image size, which is unknown for this model; set use_dynamic_shifting=False"
            )
        arguments["mu"] = _shift(config, tokens, chosen.max_shift)
    try:
        with quiet_scheduler():
            fresh = type(scheduler).from_config(config)
            fresh.set_timesteps(**arguments)
    except SCHEDULER_ERRORS as err:
        reason = f"gives no timesteps for steps={steps} ({first_line(err)})"
        raise scheduler_refusal(scheduler, reason, stepping) from err
    return fresh


def _shift(config: Any, tokens: int, max_shift: float) -> float:
    """The shift `mu`, linear in the number of image tokens, like diffusers' `calculate_shift`."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (many - few)
    return float(tokens * slope + (low - slope * few))


def set_timesteps(
    scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None = None
) -> Any:
    """A fresh copy of a scheduler with its timesteps set as diffusers' pipelines set them.

    Args:
        scheduler: scheduler of diffusers; it is not changed.
        steps: number of denoising steps.
        tokens: length of a transformer's image sequence; see `inference_timesteps`.
        stepping: the pipeline's use of the scheduler; None: noise levels and shift of Flux if the
            scheduler depends on the image size, none otherwise.

    Raises:
        UsageError: the number of steps is out of range, alone or with the scheduler's offset, or the
            scheduler rejects its settings.
    """
    fresh = _stepped_copy(scheduler, steps, tokens, stepping)
    timesteps = torch.as_tensor(fresh.timesteps).double()
    if not len(timesteps) or not bool(torch.isfinite(timesteps).all()):
        reason = f"gives timesteps for steps={steps} that are not finite numbers"
        raise scheduler_refusal(scheduler, reason, stepping)
    trained, noisiest = trained_steps(scheduler), float(timesteps.max())
    if hasattr(fresh, "alphas_cumprod") and (noisiest >= trained or float(timesteps.min()) < 0):
        wrong = noisiest if noisiest >= trained else float(timesteps.min())
        raise UsageError(
            f"steps={steps} is out of range: {scheduler_name(scheduler)} would visit timestep "
            f"{wrong:g}, but the model was trained on 0 .. {trained - 1}; choose fewer steps"
        )
    return fresh


def check_steps(
    scheduler: Any,
    steps: int,
    tokens: int | None = None,
    stepping: Stepping | None = None,
    channels: int = 3,
) -> None:
    """Raise unless a pipeline can run the scheduler from the first to the last step.

    A rehearsal steps the scheduler on a small sample of zeros, so that errors inside diffusers surface
    before any work is done. Results are cached, since a rehearsal takes about a millisecond per step.

    Args:
        scheduler: scheduler of diffusers; it is not changed.
        steps: number of denoising steps.
        tokens: length of a transformer's image sequence; see `inference_timesteps`.
        stepping: the pipeline's use of the scheduler; see `set_timesteps`.
        channels: number of channels of one sample; some solvers treat the first three as the image.

    Raises:
        UsageError: the number of steps is out of range, or the scheduler fails with its settings.
    """
    chosen = Stepping() if stepping is None else stepping
    config = json.dumps(dict(scheduler.config), sort_keys=True, default=_json_value)
    key = (type(scheduler), config, steps, tokens, stepping, channels)
    if key not in _REHEARSALS:
        fresh = set_timesteps(scheduler, steps, tokens, stepping)
        if len(_REHEARSALS) >= _MAX_REHEARSALS:
            _REHEARSALS.clear()
        _REHEARSALS[key] = _rehearsal_failure(fresh, chosen, channels)
    failure = _REHEARSALS[key]
    if failure is not None:
        reason = f"fails at steps={steps} with these settings: {failure}"
        raise scheduler_refusal(scheduler, reason, stepping)


def _json_value(value: Any) -> Any:
    """A JSON value for a setting that JSON cannot represent."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _rehearsal_failure(scheduler: Any, stepping: Stepping, channels: int) -> str | None:
    """The reason why a pipeline cannot use this scheduler, or None; changes its state."""
    mismatch = _interface_mismatch(scheduler, stepping)
    if mismatch is not None:
        return mismatch
    x = torch.zeros(1, channels, 2, 2)
    learned = str(used_settings(scheduler).get("variance_type", "")).startswith("learned")
    predicted = torch.cat([x, x], 1) if learned and stepping.generator else x
    options = _step_options(scheduler, stepping)
    try:
        with quiet_scheduler():
            if hasattr(scheduler, "scale_model_input"):
                ones = torch.ones(1, 1, 1, 1)
                scaled = scheduler.scale_model_input(ones, scheduler.timesteps[0])
                unscaled = torch.allclose(scaled, ones, atol=_MAX_SCALE_ERROR)
                if not stepping.scales_input and not unscaled:
                    return "it requires scaled denoiser inputs, which the pipeline does not pass"
            for t in scheduler.timesteps:
                if stepping.scales_input and hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                results = scheduler.step(predicted, t, x, **options, return_dict=False)
                if stepping.second_of_one and len(scheduler.timesteps) == len(results) == 1:
                    return "returns no second result for a single step, but the pipeline reads one"
                x = results[0]
    except SCHEDULER_ERRORS as err:
        return f"diffusers raises an error ({first_line(err)})"
    if not bool(torch.isfinite(x).all()):
        return "its samples become NaN or infinite"
    return None


def _interface_mismatch(scheduler: Any, stepping: Stepping) -> str | None:
    """The reason why a pipeline and a scheduler are incompatible; None if they are compatible."""
    initial = getattr(scheduler, "init_noise_sigma", None)
    if initial is None and stepping.scales_noise and not stepping.lenient:
        return "the pipeline reads its init_noise_sigma, which it does not define"
    unscaled = initial is None or abs(float(initial) - 1) <= _MAX_SCALE_ERROR
    if not stepping.scales_noise and not unscaled:
        return "it requires scaled initial noise, which the pipeline does not pass"
    scales = hasattr(scheduler, "scale_model_input")
    if not scales and stepping.scales_input and not stepping.lenient:
        return "the pipeline calls its scale_model_input, which it does not define"
    return None


def _step_options(scheduler: Any, stepping: Stepping) -> dict[str, Any]:
    """Optional arguments that the pipeline passes to `step`."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if stepping.generator or "generator" in accepted:
        options["generator"] = torch.Generator().manual_seed(0)
    if stepping.eta or "eta" in accepted:
        options["eta"] = 0.0
    return options


def inference_timesteps(
    scheduler: Any, steps: int, tokens: int | None = None, stepping: Stepping | None = None
) -> list[float]:
    """The distinct timesteps that a scheduler visits in `steps` steps, noisiest first.

    Args:
        scheduler: scheduler of diffusers; it is not changed.
        steps: number of denoising steps.
        tokens: length of a transformer's image sequence, on which some schedulers depend.
        stepping: the pipeline's use of the scheduler; see `set_timesteps`.

    Raises:
        UsageError: the number of steps is out of range, or the scheduler is not supported.
    """
    return visited_timesteps(scheduler, steps, tokens, stepping)[0].tolist()


def visited_timesteps(
    scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None
) -> tuple[Tensor, Tensor | None]:
    """Distinct timesteps and their noise levels; see `inference_timesteps`.

    Args:
        scheduler: scheduler of diffusers; it is not changed.
        steps: number of denoising steps.
        tokens: length of a transformer's image sequence, or None.
        stepping: the pipeline's use of the scheduler; see `set_timesteps`.

    Returns:
        Timesteps, float32[T], noisiest first; the scheduler's sigma of each, float32[T], or None if the
        scheduler defines none.

    Raises:
        UsageError: see `inference_timesteps`.
    """
    check_known(scheduler, stepping)
    fresh = set_timesteps(scheduler, steps, tokens, stepping)
    listed = torch.as_tensor(fresh.timesteps).float()
    if float(listed[0]) != float(listed.max()):
        raise scheduler_refusal(scheduler, "does not start at its noisiest timestep", stepping)
    # Second-order solvers list a timestep twice, once per evaluation, or return to an earlier one;
    # steps close together may share a timestep.
    first: dict[float, int] = {}
    for position, timestep in enumerate(listed.tolist()):
        first.setdefault(timestep, position)
    timesteps = sorted(first, reverse=True)
    sigmas = None
    if has_aligned_sigmas(scheduler):
        all_sigmas = torch.as_tensor(fresh.sigmas).float().cpu()
        sigmas = all_sigmas[torch.tensor([first[t] for t in timesteps])]
    return torch.tensor(timesteps), sigmas
