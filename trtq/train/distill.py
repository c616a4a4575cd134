"""Base of all methods: a student that learns from its teacher without data.

Teacher and student are the same `QuantizedDenoiser` with one copy of the float weights. A method defines
the trained parameters (`parameter_groups`) and the compared outputs (`loss`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trtq.quant.branch import DecayingBranch
from trtq.quant.modules import QuantLayer
from trtq.quant.part import QuantizedPart
from trtq.train.points import Points

__all__ = ["BranchDecay", "Distillation", "Rates"]

_SCALE_RANGE = 4.0
"""Maximum factor between a trained activation scale and its calibrated value, up or down.

The bound is a choice of this project, not of the papers. It only prevents entries from drifting towards
zero (see `Distillation.after_update`), so it is about as wide as the search of ranges
(`trtq.quant.ranges`), whose candidates differ by a factor of up to 1 / 0.21 = 4.8.
"""


@dataclass(frozen=True)
class Rates:
    """Learning rates at the first iteration, all of which decay linearly to zero.

    Attributes:
        lora: learning rate of `lora_A` and `lora_B`, in units of the layer's mean weight scale; 1/2500
            in the released code.
        weight_scale: learning rate of the weight scales.
        activation: learning rate of activation scales and zero points.
        activation_relative: whether to multiply `activation` by the layer's mean activation scale.
        tuned: learning rate of tuned weights and biases, in units of the layer's mean weight scale.
    """

    lora: float
    weight_scale: float
    activation: float
    activation_relative: bool = False
    tuned: float = 0.0


@dataclass(frozen=True)
class BranchDecay:
    """A branch next to each weight with adapters, see `trtq.quant.branch`.

    Attributes:
        rank: maximum rank of a branch.
        iterations: number of updates after which the branches are gone.
    """

    rank: int
    iterations: int


class Distillation:
    """Base class of methods: an `Objective` of `trtq.train.loop` without a loss.

    Args:
        model: quantised denoiser or a block of it, both teacher and student.
        trajectories: source of the points at which teacher and student are compared.
        rates: learning rates.
        branch: branches that help the adapters and decay; None: no branches.
    """

    def __init__(
        self,
        model: QuantizedPart,
        trajectories: Points[Any],
        rates: Rates,
        branch: BranchDecay | None = None,
    ) -> None:
        self.model = model
        self.trajectories = trajectories
        self.rates = rates
        self.branch = branch
        self._calibrated = {
            path: quantizer.scale.detach().clone() for path, quantizer in model.activations()
        }

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; parameters outside the groups stay frozen."""

    @abstractmethod
    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """Loss of micro-batch `slot` of an update, a scalar.

        Args:
            student: callable that computes the student's prediction.
            slot: index of the micro-batch in the update.
            iteration: index of the update.
        """

    def adapter_groups(self, layers: Iterable[QuantLayer]) -> list[dict[str, Any]]:
        """Groups of adapters with a rate per layer, and one group of all weight scales.

        Scale-aware optimisation (EfficientDM, eq. 8) multiplies an adapter's gradient by the layer's
        mean weight scale. Adam cancels such a factor, so the factor is part of the layer's learning
        rate, as in the released code.
        """
        adapters: list[dict[str, Any]] = []
        scales: list[Tensor] = []
        for layer in layers:
            if layer.lora_A is None or layer.lora_B is None:
                continue
            rate = self.rates.lora * layer.weight_level()
            factors = [layer.lora_A, layer.lora_B]
            if self.branch is not None:
                error = layer.updated_weight() - layer.quantized_weight()
                layer.branch = DecayingBranch(error, self.branch.rank)
                factors += layer.branch.parameters()
            adapters.append({"params": factors, "lr": rate})
            scales.append(layer.weight_scale)
            if layer.weight_scale_dequant is not None:
                scales.append(layer.weight_scale_dequant)
        return [*adapters, {"params": scales, "lr": self.rates.weight_scale}] if scales else []

    def tuned_groups(self, layers: Iterable[QuantLayer]) -> list[dict[str, Any]]:
        """Groups of tuned weights and biases with a rate per layer."""
        groups: list[dict[str, Any]] = []
        for layer in layers:
            parameters = [p for p in (layer.tuned_weight, layer.tuned_bias) if p is not None]
            rate = self.rates.tuned * layer.weight_level()
            groups.append({"params": parameters, "lr": rate})
        return groups

    def activation_groups(self, paths: Collection[str]) -> list[dict[str, Any]]:
        """Groups of scales and trained zero points of the quantisers at these paths."""
        by_rate: dict[float, list[Tensor]] = {}
        for path, quantizer in self.model.activations():
            if path not in paths:
                continue
            rate = self.rates.activation
            if self.rates.activation_relative:
                rate *= float(quantizer.scale.detach().mean())
            entries = by_rate.setdefault(rate, [])
            entries.append(quantizer.scale)
            if quantizer.zero_point_mode != "frozen":
                entries.append(quantizer.zero_point)
        return [{"params": entries, "lr": rate, "table": True} for rate, entries in by_rate.items()]

    def _branches(self) -> Iterator[tuple[QuantLayer, DecayingBranch]]:
        for _, layer in self.model.layers():
            if layer.branch is not None:
                yield layer, layer.branch

    def before_update(self, iteration: int) -> None:
        """Let the branches decay."""
        if self.branch is not None:
            for _, branch in self._branches():
                branch.decay(iteration, self.branch.iterations)

    def finish(self) -> None:
        """Remove the branches; their weights are zero after `BranchDecay.iterations` updates."""
        for layer, _ in self._branches():
            layer.branch = None

    def after_update(self) -> None:
        """Clamp zero points to the codes, and scales to a factor of their calibrated values.

        An entry has a gradient once per trajectory, but Adam's momentum moves it in every update.
        Without a bound, a scale with little effect on the loss can drift to zero.
        """
        for path, quantizer in self.model.activations():
            calibrated = self._calibrated[path]
            quantizer.clamp_(calibrated / _SCALE_RANGE, calibrated * _SCALE_RANGE)

    def state(self) -> dict[str, Tensor]:
        """The state of the current trajectories."""
        return self.trajectories.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the trajectories of `state`."""
        self.trajectories.load_state(state)
