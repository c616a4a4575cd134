"""Formats other than integers: which layers can have them, and what the other layers have instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from trtq.precision import Precision, fitting_group, parse_precision
from trtq.quant.formats.e2m1 import BLOCK
from trtq.quant.plan import LayerPlan

__all__ = ["fitted"]

_WEIGHT_ONLY = "weight_only"
_MIN_CHANNELS = 16
"""Smallest number of input and output channels of a product that TensorRT computes in FP8 or NVFP4."""


def fitted(
    plan: LayerPlan,
    module: nn.Module,
    by_recipe: bool,
    recipe: Precision,
    weight_only: str | None,
    group: int | None,
) -> LayerPlan:
    """The plan of a layer in a format that the layer can have; its reason says what was changed.

    A recipe of weight-only bits leaves the inputs of all linear layers in float: a linear layer to which
    the policy gives integers becomes weight-only. A convolution is not limited by the memory that its
    weight takes, so under such a recipe it computes in integers with 8 bits.

    Args:
        plan: plan of the layer, in the format that recipe or policy name.
        module: the float layer.
        by_recipe: whether the policy gives the layer the bits of the recipe.
        recipe: precision of the recipe.
        weight_only: bits of the layer under a weight-only recipe, from the policy; None: those of the
            recipe, or 8-bit weights for a layer to which the policy gives bits of its own.
        group: see `trtq.quant.formats.fitting_group`.
    """
    obstacle = _float_obstacle(plan, module)
    if obstacle is not None:
        reason = f"{plan.reason}; integers of 8 bits, since {obstacle}"
        return replace(plan, weight_bits=8, activation_bits=8, format="int", reason=reason)
    if recipe.format == _WEIGHT_ONLY:
        plan = _under_weight_only(plan, by_recipe, weight_only, recipe.weight_bits)
    if plan.format == _WEIGHT_ONLY and plan.kind == "linear":
        # The policy's 8-bit layers under w4a16 have one scale per output channel.
        asked = plan.weight_bits == recipe.weight_bits or recipe.format != _WEIGHT_ONLY
        plan = _grouped(plan, module, group if asked else None)
    return plan


def _float_obstacle(plan: LayerPlan, module: Any) -> str | None:
    """The reason why a layer cannot be in the format FP8 or NVFP4 of its plan; None if it can."""
    if plan.format not in ("fp8", "nvfp4"):
        return None
    if plan.kind != "linear":
        return None if plan.format == "fp8" else "NVFP4 has no convolutions"
    inputs, outputs = int(module.in_features), int(module.out_features)
    if min(inputs, outputs) < _MIN_CHANNELS:
        channels = min(inputs, outputs)
        return f"{plan.format.upper()} needs {_MIN_CHANNELS} channels, and the layer has {channels}"
    if plan.format == "nvfp4" and inputs % BLOCK:
        return f"blocks of {BLOCK} do not divide {inputs} input channels"
    return None


def _under_weight_only(
    plan: LayerPlan, by_recipe: bool, weight_only: str | None, recipe_bits: int
) -> LayerPlan:
    """The plan of a layer under a weight-only recipe, with no fewer weight bits than the recipe's."""
    if plan.kind != "linear":
        if not by_recipe:
            return plan
        reason = f"{plan.reason}; a convolution under a weight-only recipe computes in integers"
        return replace(plan, weight_bits=8, activation_bits=8, format="int", reason=reason)
    if by_recipe and weight_only is None:
        return plan
    if plan.format not in ("int", _WEIGHT_ONLY):
        return plan
    chosen = parse_precision(weight_only or ("w8a16" if plan.format == "int" else plan.precision))
    return replace(
        plan,
        weight_bits=max(chosen.weight_bits, recipe_bits),
        activation_bits=chosen.activation_bits,
        format=chosen.format,
    )


def _grouped(plan: LayerPlan, module: Any, wanted: int | None) -> LayerPlan:
    """The plan of a weight-only linear layer with the group that divides its input channels."""
    assert plan.weight_bits is not None
    channels = int(module.in_features)
    group = fitting_group(channels, wanted, plan.weight_bits)
    had = fitting_group(0, wanted, plan.weight_bits)
    if group == had:
        return replace(plan, group=group)
    form = "one scale per output channel" if group is None else f"groups of {group}"
    reason = f"{plan.reason}; {form}, since groups of {had} do not divide {channels} input channels"
    return replace(plan, group=group, reason=reason)
