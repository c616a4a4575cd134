"""Choice of each layer's input transform: none, smoothing, rotation, or both; and of its scales.

The factors of the smoothing are `c = a^alpha / w^(1 - alpha)` (SmoothQuant, arXiv 2211.10438, eq. 4).
`a` is the mean over steps of each input channel's largest absolute value, and `w` the largest absolute
weight of that channel. The factors are scaled to a geometric mean of 1.
alpha and the rotation are those with the smallest error of the layer's output at the planned bits, on
recorded rows of the input. With `scales = "auto"` the same error decides between scales per step and per
row for linear layers; for attention's products see `trtq.calib.attention_scales`.

Letters: N, K out / in features or channels; T steps; R rows per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trtq.calib.input_rows import InputRows
from trtq.calib.transform_error import OutputError, TransformChoice
from trtq.limits import NOT_SCALED, OUTLIER_RATIO
from trtq.precision import ScalePolicy
from trtq.quant.input_transform import (
    TransformTensors,
    rotation_that_fits,
    transform_layer,
    transform_obstacle,
)
from trtq.quant.plan import LayerPlan, named_errors
from trtq.quant.stored_weight import weight_shape

__all__ = ["GAIN_OF_ROWS", "smoothing_factors", "transform_layers"]

logger = logging.getLogger(__name__)

_ALPHAS = (0.25, 0.5, 0.75)
_GAIN_OF_SMOOTHING = 1.0
_GAIN_WEIGHT_ONLY = 0.9
_GAIN_OF_ROTATION = 0.9
GAIN_OF_ROWS = 0.8
"""Maximum share of the error without the transform at which the transform is worth its cost. A quantised
input is multiplied anyway; a weight-only layer gets one more operation, a rotation a product, and scales
per row a reduction."""


@torch.no_grad()
def smoothing_factors(channel_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The smoothing factors `c`, float32 `[K]`.

    Args:
        channel_max: largest absolute value of each input channel, `[K]`.
        weights: weights of all layers with this input, `[N, K, ...]` each.
        alpha: share of the range that moves to the weights.
    """
    return _factors(channel_max, _largest_by_input(weights), alpha)


def _largest_by_input(weights: Sequence[Tensor]) -> Tensor:
    """The largest absolute weight of each input channel, `[K]`, of weights `[N, K, ...]`."""
    rows = []
    for weight in weights:
        # [N, K] or [N, K, taps...] -> [N, K, taps]
        low, high = weight.float()[..., None].flatten(2).aminmax(dim=0)
        rows.append(torch.maximum(-low, high).amax(1))
    return torch.stack(rows).amax(0)


def _factors(channel_max: Tensor, largest: Tensor, alpha: float) -> Tensor:
    a, w = _positive(channel_max.float()), _positive(largest)
    logarithm = alpha * a.log2() - (1 - alpha) * w.log2()
    return (logarithm - logarithm.mean()).exp2()


def _positive(values: Tensor) -> Tensor:
    """The values, with channels that are zero or nearly zero raised to a small share of the largest."""
    return values.clamp_min(max(float(values.max()) * 2.0**-12, 2.0**-40))


def transform_layers(
    denoiser: nn.Module,
    layers: Sequence[LayerPlan],
    inputs: Mapping[str, InputRows],
    options: TransformChoice,
) -> list[LayerPlan]:
    """Choose the transforms and apply them to a float denoiser, in place.

    Layers that share an input share its transform.

    Args:
        denoiser: the float model; its function stays the same.
        layers: plans of all layers.
        inputs: recorded rows by layer that owns a quantiser.
        options: what may be chosen.

    Returns:
        The plans, with the chosen transforms.
    """
    modules = dict(denoiser.named_modules())
    groups: dict[str, list[LayerPlan]] = {}
    for plan in layers:
        if plan.weight_bits is not None and plan.quantized:
            groups.setdefault(plan.input_of or plan.name, []).append(plan)
    changed: dict[str, LayerPlan] = {}
    for owner, group in groups.items():
        entry = inputs.get(owner)
        members = [modules[plan.name] for plan in group]
        if entry is None or not entry.complete or not _alike(group, members, entry):
            continue
        ratio = entry.outlier_ratio
        with named_errors(owner):
            chosen, scales = _choose_with_scales(entry, group, members, options.limited(group))
        for plan, module in zip(group, members, strict=True):
            plan = replace(plan, outlier_ratio=round(ratio, 2), scales=scales)
            if chosen is not None:
                transform_layer(module, chosen)
                smooth = chosen.inv_channels is not None
                plan = replace(plan, smooth=smooth, rotate=chosen.rotation)
            changed[plan.name] = plan
    result = [changed.get(plan.name, plan) for plan in layers]
    _warn(result)
    return result


def _alike(group: Sequence[LayerPlan], members: Sequence[Any], entry: InputRows) -> bool:
    """Whether one transform suits all layers of a group."""
    linear = {plan.kind == "linear" for plan in group}
    channels = entry.channel_max.shape[1]
    return len(linear) == 1 and all(
        transform_obstacle(member) is None and weight_shape(member)[1] == channels
        for member in members
    )


def _choose_with_scales(
    entry: InputRows, group: Sequence[LayerPlan], members: Sequence[Any], options: TransformChoice
) -> tuple[TransformTensors | None, ScalePolicy]:
    """The transform, and the origin of the scales where the plans leave it open."""
    error, chosen = _choose(entry, group, members, options)
    if not all(plan.free_scales for plan in group):
        return chosen, group[0].scales
    by_row = [replace(plan, scales="row") for plan in group]
    row_error, row_chosen = _choose(entry, by_row, members, options)
    return (row_chosen, "row") if row_error < GAIN_OF_ROWS * error else (chosen, "step")


def _choose(
    entry: InputRows, group: Sequence[LayerPlan], members: Sequence[Any], options: TransformChoice
) -> tuple[float, TransformTensors | None]:
    """The transform with the smallest error, if the gain is worth its cost; None: no transform.

    Returns:
        The error with the transform, and the transform.
    """
    weights = [member.weight.detach().float().cpu() for member in members]
    error = OutputError(entry, group, weights, options)
    best, chosen = error.of(None), None
    candidates = list(_candidates(entry, weights, options))
    smoothing = _GAIN_OF_SMOOTHING if group[0].operands else _GAIN_WEIGHT_ONLY
    for rotated, gain in ((False, smoothing), (True, _GAIN_OF_ROTATION)):
        errors = [(error.of(each), each) for each in candidates if bool(each.rotation) == rotated]
        if errors:
            smallest, transform = min(errors, key=lambda pair: pair[0])
            if smallest < gain * best:
                best, chosen = smallest, transform
    return best, chosen


def _candidates(
    entry: InputRows, weights: Sequence[Tensor], options: TransformChoice
) -> Iterator[TransformTensors]:
    channel_max = entry.channel_max.mean(0)
    smoothings: list[Tensor | None] = [None]
    if options.smooth:
        largest = _largest_by_input(weights)
        smoothings += [_factors(channel_max, largest, alpha) for alpha in _ALPHAS]
    rotation = rotation_that_fits(len(channel_max), options.rotate) if options.rotate else 0
    for order in {0, rotation}:
        for factors in smoothings:
            if order or factors is not None:
                yield TransformTensors.of_channels(factors, order)


def _warn(layers: Sequence[LayerPlan]) -> None:
    """Name the inputs with outlier channels, and what was done."""
    rows = [
        plan
        for plan in layers
        if plan.outlier_ratio is not None
        and plan.outlier_ratio > OUTLIER_RATIO
        and plan.input_of is None
    ]
    if not rows:
        return
    rows.sort(key=lambda plan: plan.outlier_ratio or 0, reverse=True)
    shown = ", ".join(
        f"{plan.name} ({plan.outlier_ratio:.0f} x, {_done(plan)})" for plan in rows[:5]
    )
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    logger.warning(
        "the largest channel of an input is over %g x the median channel in %d layers: %s%s",
        OUTLIER_RATIO,
        len(rows),
        shown,
        more,
    )


def _done(plan: LayerPlan) -> str:
    parts = ["smoothed"] * plan.smooth + [f"rotated by {plan.rotate}"] * bool(plan.rotate)
    obstacle = plan.reason.partition(NOT_SCALED)[2]
    return " and ".join(parts) or f"unchanged: {obstacle}".removesuffix(": ")
