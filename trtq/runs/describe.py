"""The report of `trtq quantize --dry-run`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trtq.calib.recipe import Recipe
from trtq.lora import LoraRequest
from trtq.quant.stored_weight import weight_shape
from trtq.runs.estimate import Estimate, estimate, estimate_calls
from trtq.runs.given_calls import runs_in_call
from trtq.runs.memory import parse_memory, stores_weights
from trtq.runs.plan import QuantizePlan, plan_quantize
from trtq.runs.plan_calls import plan_calls
from trtq.runs.result import PlanResult

__all__ = ["describe_quantize"]


def describe_quantize(
    model: Any,
    recipe: Recipe,
    loras: Sequence[LoraRequest] = (),
    calls: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    memory: str | None = None,
) -> PlanResult:
    """Plan what `trtq.quantize` does with the same arguments, and summarise the plan.

    The summary lists layers by precision, sizes, timesteps, trained parameters and the estimated cost.

    Raises:
        TrtqError: as `trtq.runs.quantize.quantize`, for what is known before the calibration.
    """
    limit = None if memory is None else parse_memory(memory)
    stored = stores_weights(model, recipe, limit)
    if not runs_in_call(model, calls, inputs, stored=stored):
        plan = plan_quantize(model, recipe, loras)
        return _summary([(plan.source.denoiser_name, plan)], estimate(plan))
    planned = plan_calls(model, recipe, calls or (), loras, inputs, stored=stored)
    parts = [(part.name, part.plan) for part in planned.denoisers]
    return _summary(parts, estimate_calls(planned, stored=stored))


def _summary(parts: Sequence[tuple[str, QuantizePlan]], cost: Estimate) -> PlanResult:
    """The summary of the plans of all denoisers, by name."""
    plans = [plan for _, plan in parts]
    recipe, training = plans[0].recipe, plans[0].recipe.training
    layers = [
        (f"{name}.{layer.name}" if len(parts) > 1 else layer.name, layer)
        for name, plan in parts
        for layer in plan.layers
    ]
    blocks = None if recipe.blockwise is None else sum(len(plan.blocks()) for plan in plans)
    return PlanResult(
        model=plans[0].source.name,
        denoiser=", ".join(dict.fromkeys(type(plan.source.denoiser).__name__ for plan in plans)),
        method=recipe.method,
        layers_quantized=sum(layer.quantized for _, layer in layers),
        layers_float=sum(not layer.quantized for _, layer in layers),
        precisions=dict(Counter(layer.precision for _, layer in layers)),
        float_layers=[name for name, layer in layers if not layer.quantized],
        timesteps=len({timestep for plan in plans for timestep in plan.table.timesteps.tolist()}),
        calibration_images=recipe.calibration.images or 0,
        bytes_before=sum(plan.bytes_before() for plan in plans),
        bytes_after=sum(plan.bytes_after() for plan in plans),
        iterations=training.iterations if training else 0,
        blocks=blocks,
        adapter_parameters=sum(_adapter_parameters(plan) for plan in plans),
        estimated_seconds=cost.seconds,
        estimated_peak_bytes=cost.peak_bytes,
    )


def _adapter_parameters(plan: QuantizePlan) -> int:
    """Number of parameters of the adapters that fine-tuning trains."""
    training = plan.recipe.training
    if training is None:
        return 0
    modules = dict(plan.source.denoiser.named_modules())
    count = 0
    for layer in plan.layers:
        if layer.weight_bits is not None and layer.adapters:
            outputs, *inputs = weight_shape(modules[layer.name])
            count += training.rank * (outputs + math.prod(inputs))
    return count
