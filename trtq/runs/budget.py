"""Assignment of weight bits within a budget of size or operations, by sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trtq.calib.budget import Budget
from trtq.calib.sensitivity import FLOAT_BITOPS, spend, weight_sensitivity, with_bits
from trtq.calls.form import result_tensors
from trtq.calls.processors import with_processors
from trtq.calls.recorder import RecordedCall, call_until, observed
from trtq.calls.user_call import UserCall, run_call
from trtq.diffusion.sampling import at_once, predict, seeded_noise, spread
from trtq.progress import ProgressCallback
from trtq.quant import (
    LayerPlan,
)
from trtq.runs.sizes import weight_bytes
from trtq.seeds import seeded_generator

if TYPE_CHECKING:
    from trtq.runs.plan import QuantizePlan

__all__ = ["predictions_in_call", "predictions_on_trajectories", "spend_budget"]


_SENSITIVITY_IMAGES = 20
_SENSITIVITY_CALLS = 8
"""Number of the denoiser's calls, evenly spaced over the pipeline's call."""


def predictions_on_trajectories(plan: QuantizePlan) -> Callable[[], Tensor]:
    """A function that computes the predictions of a plan's denoiser at steps of its trajectories."""
    source, recipe = plan.source, plan.recipe
    schedule = source.schedule(recipe.steps)
    generator = seeded_generator(recipe.seed, "sensitivity conditions")
    images = at_once(source.sample_shape, _SENSITIVITY_IMAGES)
    conditions = source.draw_conditions(images, generator)
    noise = seeded_noise(source.sample_shape, recipe.seed, 0, images, "sensitivity")
    guidance = recipe.guidance or 1.0
    x, timestep = spread(source.denoiser, schedule, noise, conditions, guidance)
    return lambda: predict(source.denoiser, x, timestep, conditions, guidance)


def predictions_in_call(
    pipeline: Any, name: str, call: UserCall, number: int, seed: int
) -> Callable[[], Tensor]:
    """A function that computes the predictions of a denoiser on inputs of its pipeline's call.

    Args:
        pipeline: diffusers pipeline.
        name: component that is called.
        call: arguments of the pipeline's call.
        number: number of calls of the denoiser during the pipeline's call.
        seed: seed of the random numbers.
    """
    module = getattr(pipeline, name)
    wanted = {round(place) for place in np.linspace(0, number - 1, _SENSITIVITY_CALLS)}
    kept: list[RecordedCall] = []
    places = itertools.count()

    def keep(seen: RecordedCall) -> None:
        if next(places) in wanted:
            kept.append(seen.copied())

    with torch.no_grad(), observed({name: module}, keep):
        call_until(
            pipeline,
            {name: module},
            number,
            lambda: run_call(pipeline, call, seed, "sensitivity"),
        )

    def predictions() -> Tensor:
        outputs: list[Tensor] = []
        for recorded in kept:
            with with_processors(module, recorded.processors):
                result = module(**recorded.form.rebuild(recorded.tensors))
            outputs += result_tensors(result)
        return torch.cat([output.float().flatten() for output in outputs])

    return predictions


def spend_budget(
    plan: QuantizePlan,
    budget: Budget,
    predictions: Callable[[], Tensor],
    progress: ProgressCallback,
) -> list[LayerPlan]:
    """Choose the weight bits of the layers that have the recipe's default bits, by sensitivity.

    Args:
        plan: plan of the quantisation; not changed.
        budget: share of the float model's size or bit operations that may be used.
        predictions: see `trtq.calib.sensitivity.weight_sensitivity`.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        One plan per layer, with the chosen weight bits.
    """
    source, recipe = plan.source, plan.recipe
    names = [layer.name for layer in plan.layers if layer.adapters and layer.weight_bits]
    sensitivity = weight_sensitivity(
        source.denoiser,
        names,
        predictions,
        recipe.calibration.weights,
        progress=lambda done, total: progress("measure sensitivity", done, total),
    )
    modules: dict[str, Any] = dict(source.denoiser.named_modules())
    if budget.kind == "size":
        fixed = plan.bytes_after() - sum(
            weight_bytes(modules[layer.name].weight, layer.weight_bits or 0)
            for layer in plan.layers
            if layer.name in sensitivity
        )
        available = budget.share * plan.bytes_before() - fixed

        def cost(name: str, bits: int) -> float:
            return weight_bytes(modules[name].weight, bits)
    else:
        counts = {name: call.multiplications for name, call in plan.calls.items()}
        widths = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in plan.layers}
        whole = sum(counts.values())
        spent = sum(
            count * ((w or 16) * (a or 16))
            for name, count in counts.items()
            for w, a in [widths[name]]
            if name not in sensitivity
        )
        available = budget.share * whole * FLOAT_BITOPS - spent

        def cost(name: str, bits: int) -> float:
            return counts[name] * bits * (widths[name][1] or 16)

    return with_bits(plan.layers, spend(sensitivity, cost, available))
