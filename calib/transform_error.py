"""Error of the outputs of layers at their planned bits, under a transform of their input.

Letters: N, K out / in features or channels; T steps; R rows per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trtq.calib.input_rows import InputRows
from trtq.precision import Method
from trtq.quant.dynamic_scale import row_scale
from trtq.quant.fake_quant import fake_quant
from trtq.quant.formats import format_range, layer_class
from trtq.quant.input_transform import InputTransform, TransformTensors
from trtq.quant.modules import QuantLayer
from trtq.quant.plan import LayerPlan
from trtq.quant.ranges import row_qparams
from trtq.quant.timestep import TimestepTable
from trtq.seeds import seeded_generator

__all__ = ["OutputError", "TransformChoice", "some_outputs"]

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


def some_outputs(weight: Tensor) -> Tensor:
    """Output channels of a weight `[N, ...]`, evenly spaced, that stand for all of them."""
    drawn = torch.linspace(0, len(weight) - 1, min(_CHANNELS, len(weight))).long()
    return weight[drawn.to(weight.device)]


class OutputError:
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
        self.plan = group[0]
        self.bits = group[0].activation_bits or 8
        self.options = options
        self.linear = group[0].kind == "linear"
        # The rows of a convolution are images, of which the sample holds single pixels.
        self.scales = group[0].scales if self.linear else "step"
        values = self.rows[0].numel()
        generator = seeded_generator(0, "values for ranges")
        self._drawn = torch.randperm(values, generator=generator)[:_VALUES]
        self.weights = [
            (some_outputs(weight), plan) for weight, plan in zip(weights, group, strict=True)
        ]

    @torch.no_grad()
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
            layer = _linear_layer(weight, plan, self.options.weights)
            rounded = layer.quantized_weight().detach().reshape(weight.shape)
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
        if self.plan.format != "int":
            return self._coded_by_format(x)
        if self.scales == "row":
            scale = row_scale(x, self.bits, "last")
            return fake_quant(x, scale, 2 ** (self.bits - 1), 0, 2**self.bits - 1)
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
        return fake_quant(x, scale, zero_point, 0, 2**self.bits - 1)

    def _coded_by_format(self, x: Tensor) -> Tensor:
        """The representable values of rows in another format than integers."""
        if not self.plan.operands:
            return x
        layer = _linear_layer(self.weights[0][0], self.plan, self.options.weights, len(x))
        flat = x.flatten(1)
        layer.activation.set_range(*format_range(self.plan.format, flat.amin(1), flat.amax(1)))
        return torch.stack([layer.activation(rows, step) for step, rows in enumerate(x)])


def _linear_layer(weight: Tensor, plan: LayerPlan, method: Method, steps: int = 1) -> QuantLayer:
    """A linear layer in the plan's format, with a weight `[N, K, ...]` as `[N, K * taps]`."""
    source = nn.Linear(weight[0].numel(), len(weight), bias=False)
    source.weight = nn.Parameter(weight.flatten(1))
    made: QuantLayer = layer_class("linear", plan.format, plan.group)(
        source,
        TimestepTable(range(steps)),
        weight_bits=plan.weight_bits,
        activation_bits=plan.activation_bits,
        weight_method=method,
    )
    return made


def _transformed_rows(x: Tensor, transform: TransformTensors) -> Tensor:
    """Rows `[T, R, K]` under a transform."""
    result: Tensor = InputTransform(transform, -1)(x)
    return result
