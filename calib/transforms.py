"""Choice of each layer's input transform: none, smoothing, rotation, or both.

The factors of the smoothing are `c = a^alpha / w^(1 - alpha)` (SmoothQuant, arXiv 2211.10438, eq. 4).
`a` is the mean over steps of each input channel's largest absolute value, and `w` the largest absolute
weight of that channel. The factors are scaled to a geometric mean of 1.
alpha and the rotation are those with the smallest error of the layer's output at the planned bits, on
recorded rows of the input.

Letters: N, K out / in features or channels; T steps; R rows per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtq.calib.input_rows import InputRows
from trtq.limits import OUTLIER_RATIO
from trtq.quant.bits import symmetric_weights
from trtq.quant.dynamic_scale import row_scale
from trtq.quant.input_transform import (
    InputTransform,
    TransformTensors,
    rotation_that_fits,
    transform_layer,
    transform_obstacle,
)
from trtq.quant.plan import LayerPlan, named_errors
from trtq.quant.ranges import Method, row_qparams, weight_qparams
from trtq.seeds import seeded_generator

__all__ = ["TransformChoice", "smoothing_factors", "transform_layers"]

logger = logging.getLogger(__name__)

_ALPHAS = (0.25, 0.5, 0.75)
_GAIN_OF_SMOOTHING = 1.0
_GAIN_OF_ROTATION = 0.90
"""Largest share of the error without the transform at which the transform is worth its cost. A rotation
costs a product at run time."""
_CHANNELS = 64
_VALUES = 4096


@dataclass(frozen=True)
class TransformChoice:
    """Options of the choice.

    Attributes:
        smooth: whether smoothing may be chosen.
        rotate: maximum order of a rotation; 0: no rotation is chosen.
        activations: method that determines the ranges of activations.
        weights: method that determines the ranges of weights.
        static: whether one scale serves all steps.
    """

    smooth: bool = True
    rotate: int = 0
    activations: Method = "search"
    weights: Method = "search"
    static: bool = False

    def limited(self, group: Sequence[LayerPlan]) -> TransformChoice:
        """The options within the limits of the policy's rules for the layers of a group."""
        orders = [plan.may_rotate for plan in group if plan.may_rotate is not None]
        return replace(
            self,
            smooth=self.smooth and all(plan.may_smooth for plan in group),
            rotate=min(orders) if orders else self.rotate,
        )


@torch.no_grad()
def smoothing_factors(channel_max: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The smoothing factors `c`, float32 `[K]`.

    Args:
        channel_max: largest absolute value of each input channel, `[K]`.
        weights: weights of all layers with this input, `[N, K, ...]` each.
        alpha: share of the range that moves to the weights.
    """
    # [N, K] or [N, K, taps...] -> [N, K, taps]
    by_layer = [weight.float().abs()[..., None].flatten(2) for weight in weights]
    largest = torch.stack([each.amax((0, 2)) for each in by_layer]).amax(0)
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
        if plan.weight_bits is not None and plan.operands and plan.format == "int":
            groups.setdefault(plan.input_of or plan.name, []).append(plan)
    changed: dict[str, LayerPlan] = {}
    for owner, group in groups.items():
        entry = inputs.get(owner)
        members = [modules[plan.name] for plan in group]
        if entry is None or not entry.complete or not _alike(group, members, entry):
            continue
        ratio = entry.outlier_ratio
        with named_errors(owner):
            chosen = _choose(entry, group, members, options.limited(group))
        for plan, module in zip(group, members, strict=True):
            plan = replace(plan, outlier_ratio=round(ratio, 2))
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
        transform_obstacle(member) is None and member.weight.shape[1] == channels
        for member in members
    )


def _choose(
    entry: InputRows, group: Sequence[LayerPlan], members: Sequence[Any], options: TransformChoice
) -> TransformTensors | None:
    """The transform with the smallest error, if the gain is worth its cost; None: no transform."""
    weights = [member.weight.detach().float().cpu() for member in members]
    error = _Error(entry, group, weights, options)
    best, chosen = error.of(None), None
    candidates = list(_candidates(entry, weights, options))
    for rotated, gain in ((False, _GAIN_OF_SMOOTHING), (True, _GAIN_OF_ROTATION)):
        errors = [(error.of(each), each) for each in candidates if bool(each.rotation) == rotated]
        if errors:
            smallest, transform = min(errors, key=lambda pair: pair[0])
            if smallest < gain * best:
                best, chosen = smallest, transform
    return chosen


def _candidates(
    entry: InputRows, weights: Sequence[Tensor], options: TransformChoice
) -> Iterator[TransformTensors]:
    channel_max = entry.channel_max.mean(0)
    smoothings: list[Tensor | None] = [None]
    if options.smooth:
        smoothings += [smoothing_factors(channel_max, weights, alpha) for alpha in _ALPHAS]
    rotation = rotation_that_fits(len(channel_max), options.rotate) if options.rotate else 0
    for order in {0, rotation}:
        for factors in smoothings:
            if order or factors is not None:
                yield TransformTensors.of_channels(factors, order)


class _Error:
    """Relative error of the outputs of a group of layers under a transform.

    Only some output channels are computed. For a convolution the error is estimated from second
    moments of the rows, as if the errors of its taps were independent.
    """

    def __init__(
        self,
        entry: InputRows,
        group: Sequence[LayerPlan],
        weights: Sequence[Tensor],
        options: TransformChoice,
    ) -> None:
        self.rows = entry.rows.flatten(0, 1)[None] if options.static else entry.rows
        self.bits = group[0].activation_bits or 8
        self.options = options
        self.linear = group[0].kind == "linear"
        # The rows of a convolution are images, of which the sample holds single pixels.
        self.scales = group[0].scales if self.linear else "step"
        values = self.rows[0].numel()
        generator = seeded_generator(0, "values for ranges")
        self._drawn = torch.randperm(values, generator=generator)[:_VALUES]
        self.weights = [
            (weight[torch.linspace(0, len(weight) - 1, min(_CHANNELS, len(weight))).long()], plan)
            for weight, plan in zip(weights, group, strict=True)
        ]

    def of(self, transform: TransformTensors | None) -> float:
        """The error under a transform, summed over the layers; None: without a transform."""
        x = self.rows
        if transform is not None:
            x = _transformed_rows(x, transform)
        coded = self._coded(x)
        x, coded = x.flatten(0, 1), coded.flatten(0, 1)
        total = 0.0
        for weight, plan in self.weights:
            if transform is not None:
                weight = transform.weight(weight)
            rounded = self._rounded(weight, plan.weight_bits or 8)
            if self.linear:
                exact = x @ weight.T
                noise = (coded @ rounded.T - exact).square().mean()
                power = exact.square().mean()
            else:
                w, dw = (
                    each.flatten(2).square().sum((0, 2)) for each in (weight, rounded - weight)
                )
                power_x, noise_x = x.square().mean(0), (coded - x).square().mean(0)
                noise = (noise_x * w + power_x * dw).sum()
                power = (power_x * w).sum()
            total += float(noise / power.clamp_min(1e-30))
        return total

    def _coded(self, x: Tensor) -> Tensor:
        """The representable values of rows `[T, R, K]` with a scale for each step."""
        if self.scales == "row":
            scale = row_scale(x, self.bits, "last")
            half = 2 ** (self.bits - 1)
            return (x / scale).round().clamp(-half, half - 1) * scale
        flat = x.flatten(1)
        scale, zero_point = row_qparams(
            flat[:, self._drawn],
            flat.amin(1),
            flat.amax(1),
            self.bits,
            self.options.activations,
            symmetric=self.bits == 8 or self.scales != "step",
            contain_zero=True,
        )
        scale, zero_point = scale[:, None, None], zero_point[:, None, None]
        if self.scales == "hybrid":
            scale = torch.minimum(scale, row_scale(x, self.bits, "last"))
        codes = (x / scale).round().clamp(-zero_point, 2**self.bits - 1 - zero_point)
        return codes * scale

    def _rounded(self, weight: Tensor, bits: int) -> Tensor:
        scale, zero_point = weight_qparams(
            weight,
            bits,
            self.options.weights,
            symmetric=symmetric_weights(bits),
            contain_zero=True,
        )
        codes = (weight / scale).round().add(zero_point).clamp(0, 2**bits - 1)
        return (codes - zero_point) * scale


def _transformed_rows(x: Tensor, transform: TransformTensors) -> Tensor:
    """Rows `[T, R, K]` under a transform."""
    result: Tensor = InputTransform(transform, -1)(x)
    return result


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
    return " and ".join(parts) or "unchanged"
