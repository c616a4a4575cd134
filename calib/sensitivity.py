"""Mixed precision: measure the error of each layer by weight bits, and choose bits within a budget.

A layer's sensitivity at `b` bits is the squared error of the noise prediction, relative to its power,
if this layer's weight alone is rounded to `b` bits, at points along the float model's trajectories. The
errors of layers are assumed to be additive. All layers start with the largest number of bits; bits are
then removed from the layer with the smallest added error per unit of saved cost until the budget is met
(the greedy solution of the knapsack problem, on each layer's lower convex hull).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trtq.bits import symmetric_weights
from trtq.errors import NonFiniteError, RecipeError
from trtq.precision import Method
from trtq.quant.fake_quant import fake_quant
from trtq.quant.plan import LayerPlan
from trtq.quant.ranges import weight_qparams

__all__ = [
    "CANDIDATES",
    "spend",
    "weight_sensitivity",
    "with_bits",
]

CANDIDATES = (2, 3, 4, 5, 6, 8)
FLOAT_BITOPS = 16 * 16
"""Bit operations of one multiplication in half precision, the unit of a `bitops` budget."""


@torch.no_grad()
def weight_sensitivity(
    denoiser: nn.Module,
    names: Sequence[str],
    predict: Callable[[], Tensor],
    method: Method,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Relative error of the prediction, by layer and weight bits.

    Args:
        denoiser: float model; its weights are restored after each measurement.
        names: paths of the layers to measure.
        predict: function that returns the denoiser's predictions at points of its trajectories, in any
            shape.
        method: method that determines the weight ranges.
        progress: callback with the completed and the total number of layers.

    Raises:
        NonFiniteError: the prediction is NaN or infinite; the message names the layer.
    """
    exact = predict()
    power = float(exact.square().mean())
    errors: dict[str, dict[int, float]] = {}
    for done, name in enumerate(names):
        weight: Any = denoiser.get_submodule(name).weight
        kept = weight.detach().clone()
        errors[name] = {}
        try:
            for bits in CANDIDATES:
                scale, zero_point = weight_qparams(
                    kept, bits, method, symmetric=symmetric_weights(bits), contain_zero=True
                )
                weight.copy_(fake_quant(kept, scale, zero_point, 0, 2**bits - 1))
                error = predict() - exact
                errors[name][bits] = float(error.square().mean()) / power
        finally:
            weight.copy_(kept)
        if not all(value < float("inf") for value in errors[name].values()):
            raise NonFiniteError(
                f"layer {name!r}: the prediction is NaN or infinite when the layer is rounded"
            )
        if progress is not None:
            progress(done + 1, len(names))
    return errors


def spend(
    sensitivity: Mapping[str, Mapping[int, float]],
    cost: Callable[[str, int], float],
    available: float,
) -> dict[str, int]:
    """Choose the bits of every layer for the smallest total error within the available cost.

    Args:
        sensitivity: error by layer and bits.
        cost: function `(layer, bits) -> cost`, increasing in the bits.
        available: maximum total cost of all layers.

    Raises:
        RecipeError: the cost is exceeded even with the smallest number of bits in every layer.
    """
    bits = {name: max(choices) for name, choices in sensitivity.items()}
    total = sum(cost(name, count) for name, count in bits.items())
    while total > available:
        best: tuple[float, str, int] | None = None
        for name, current in bits.items():
            for fewer in (count for count in sensitivity[name] if count < current):
                saved = cost(name, current) - cost(name, fewer)
                lost = max(0.0, sensitivity[name][fewer] - sensitivity[name][current])
                if saved > 0 and (best is None or lost / saved < best[0]):
                    best = lost / saved, name, fewer
        if best is None:
            raise RecipeError(
                f"the budget cannot be met: the fewest bits in every layer need {total:.4g}, and "
                f"{available:.4g} are available; allow more"
            )
        _, name, fewer = best
        total -= cost(name, bits[name]) - cost(name, fewer)
        bits[name] = fewer
    return bits


def with_bits(plans: Sequence[LayerPlan], bits: Mapping[str, int]) -> list[LayerPlan]:
    """Replace the weight bits of the layers in `bits`.

    Args:
        plans: plans of all layers.
        bits: new weight bits by layer.
    """
    return [
        replace(
            plan,
            weight_bits=bits[plan.name],
            reason=f"{bits[plan.name]}-bit weights by sensitivity; {plan.reason}",
        )
        if plan.name in bits
        else plan
        for plan in plans
    ]
