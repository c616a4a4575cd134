"""Whether calls of a denoiser at different steps can be fine-tuned together, in one batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trtq.calls.form import result_tensors
from trtq.calls.joined import BatchAxes, Joined, batch_axes
from trtq.calls.paused import DenoiserCall
from trtq.calls.recorder import RecordedCall
from trtq.errors import TrtqError
from trtq.quant import QuantizedDenoiser
from trtq.quant.timestep import float_scope
from trtq.runs.plan_calls import CallsPlan, DenoiserPlan
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

__all__ = ["joint_axes", "steps_per_item"]

logger = logging.getLogger(__name__)

_FLOAT_DB, _LOW_BIT_DB = 60.0, 30.0
"""Minimum SNR of joint results against those of single calls. Float results differ in their last bits;
a difference in the last bit of an input can change a low-bit code."""
_FROM_MODELS = (TrtqError, RuntimeError, ValueError, TypeError, LookupError, AssertionError)
"""Exceptions of models whose calls cannot be joined."""


def joint_axes(
    plan: CallsPlan, part: DenoiserPlan, quantized: QuantizedDenoiser, device: torch.device
) -> dict[str, BatchAxes]:
    """Axes of the batch by the key of a call's form; empty if calls cannot be joined.

    Every form is tried: the results of two calls at the first and the last step have to be those of the
    single calls, in float and in low bits.

    Args:
        plan: the plan of the pipeline.
        part: plan of the denoiser.
        quantized: the quantised denoiser, on `device`.
        device: device of the pipeline.
    """
    pipeline, recipe = plan.source.pipeline, plan.recipe
    modules = {other.name: other.module for other in plan.denoisers}
    argument = part.calls.argument
    try:
        with float_scope():
            axes = batch_axes(pipeline, modules, part.name, argument, plan.call, recipe.seed)
        for key, recorded in part.calls.first.items():
            if recorded.processors:
                raise ValueError(
                    "its pipeline sets attention processors, which may split the batch"
                )
            _try(quantized, recorded, axes[key], part.calls.timesteps, recipe.seed, device)
    except _FROM_MODELS as err:
        logger.info("the calls of %s are fine-tuned one by one: %s", part.name, err)
        return {}
    return axes


_TRIES = 4
"""Maximum number of pairs of calls that are tried. In one pair a low-bit code may flip by chance;
results of the wrong rows or steps fail in every pair."""


def _try(
    quantized: QuantizedDenoiser,
    recorded: RecordedCall,
    axes: BatchAxes,
    timesteps: Sequence[float],
    seed: int,
    device: torch.device,
) -> None:
    """Raise unless joint calls of a form give the results of single calls; errors as of `_check`."""
    for attempt in range(_TRIES):
        try:
            pair = _two_calls(recorded, axes, timesteps, seed + attempt, device)
            return _check(quantized, pair, axes)
        except ValueError:
            if attempt == _TRIES - 1:
                raise
    return None


@contextmanager
def steps_per_item(quantized: QuantizedDenoiser, per_item: bool) -> Iterator[None]:
    """Inside the block, each row of a call has its own step if `per_item`."""
    before, quantized.per_item = quantized.per_item, per_item
    try:
        yield
    finally:
        quantized.per_item = before


def _two_calls(
    recorded: RecordedCall,
    axes: BatchAxes,
    timesteps: Sequence[float],
    seed: int,
    device: torch.device,
) -> list[RecordedCall]:
    """The recorded call at the first and, with another noisy sample, at the last timestep."""
    tensors = {path: tensor.to(device) for path, tensor in recorded.tensors.items()}
    sample = next(iter(axes.axes))
    noise = torch.randn(tensors[sample].shape, generator=seeded_generator(seed, "joint calls"))
    pair = []
    for timestep, value in (
        (max(timesteps), tensors[sample]),
        (min(timesteps), noise.to(tensors[sample])),
    ):
        at_step = torch.full_like(tensors[axes.argument], timestep)
        changed: Mapping[str, Tensor] = {**tensors, sample: value, axes.argument: at_step}
        pair.append(RecordedCall(recorded.denoiser, recorded.form, changed))
    return pair


@torch.no_grad()
def _check(quantized: QuantizedDenoiser, pair: Sequence[RecordedCall], axes: BatchAxes) -> None:
    """Raise unless joint calls give the results of single calls.

    Raises:
        ValueError: the results differ, or the calls do not fit together.
    """
    if not axes.fit(*pair):
        raise ValueError("two calls with the same arguments do not fit together")
    calls = [DenoiserCall((), call.form.rebuild(call.tensors)) for call in pair]
    joined = Joined.of(calls, pair, axes)
    with float_scope():
        _compare(quantized.denoiser, joined, calls, _FLOAT_DB)
    with steps_per_item(quantized, True):
        _compare(quantized, joined, calls, _LOW_BIT_DB)


def _compare(
    denoiser: Callable[..., Any], joined: Joined, calls: Sequence[DenoiserCall], bound: float
) -> None:
    for together, call in zip(joined.compute(denoiser), calls, strict=True):
        alone = denoiser(**call.kwargs)
        for expected, given in zip(result_tensors(alone), result_tensors(together), strict=True):
            snr = snr_db(expected, given)
            if not snr >= bound:
                raise ValueError(f"joint calls reach {snr:.1f} dB against single calls")
