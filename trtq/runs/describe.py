"""The report of `trtq quantize --dry-run`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trtq.runs.estimate import estimate
from trtq.runs.plan import QuantizePlan
from trtq.runs.result import PlanResult

__all__ = ["describe_plan"]


def describe_plan(plan: QuantizePlan) -> PlanResult:
    """Summarise a plan: layers by precision, sizes, timesteps, trained parameters, estimated cost."""
    training = plan.recipe.training
    cost = estimate(plan)
    return PlanResult(
        model=plan.source.name,
        denoiser=type(plan.source.denoiser).__name__,
        method=plan.recipe.method,
        layers_quantized=plan.quantized,
        layers_float=len(plan.layers) - plan.quantized,
        precisions=dict(Counter(layer.precision for layer in plan.layers)),
        float_layers=[layer.name for layer in plan.layers if not layer.quantized],
        timesteps=len(plan.table),
        calibration_images=plan.recipe.calibration.images or 0,
        bytes_before=plan.bytes_before(),
        bytes_after=plan.bytes_after(),
        iterations=training.iterations if training else 0,
        blocks=None if plan.recipe.blockwise is None else len(plan.blocks()),
        adapter_parameters=_adapter_parameters(plan),
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
            weight: Any = modules[layer.name].weight
            count += training.rank * (len(weight) + weight[0].numel())
    return count
