"""Assignment of weight bits within a budget of size or operations, by sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtq.calib.budget import Budget
from trtq.calib.sensitivity import FLOAT_BITOPS, spend, weight_sensitivity, with_bits
from trtq.diffusion.sampling import at_once, seeded_noise, spread
from trtq.progress import ProgressCallback
from trtq.quant import (
    LayerPlan,
)
from trtq.runs.sizes import weight_bytes
from trtq.seeds import seeded_generator

if TYPE_CHECKING:
    from trtq.runs.plan import QuantizePlan

__all__ = ["spend_budget"]


_SENSITIVITY_IMAGES = 20


def spend_budget(plan: QuantizePlan, budget: Budget, progress: ProgressCallback) -> list[LayerPlan]:
    """Choose the weight bits of the layers that have the recipe's default bits, by sensitivity.

    Args:
        plan: plan of the quantisation; not changed.
        budget: share of the float model's size or bit operations that may be used.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        One plan per layer, with the chosen weight bits.
    """
    source, recipe = plan.source, plan.recipe
    names = [layer.name for layer in plan.layers if layer.adapters and layer.weight_bits]
    schedule = source.schedule(recipe.steps)
    generator = seeded_generator(recipe.seed, "sensitivity conditions")
    images = at_once(source.sample_shape, _SENSITIVITY_IMAGES)
    conditions = source.draw_conditions(images, generator)
    noise = seeded_noise(source.sample_shape, recipe.seed, 0, images, "sensitivity")
    guidance = recipe.guidance or 1.0
    x, timestep = spread(source.denoiser, schedule, noise, conditions, guidance)
    sensitivity = weight_sensitivity(
        source.denoiser,
        names,
        x,
        timestep,
        conditions,
        recipe.calibration.weights,
        guidance=guidance,
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
