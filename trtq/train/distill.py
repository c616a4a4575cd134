"""What all methods share: a student that follows its teacher without data.

Teacher and student are the same `QuantizedDenoiser`, on one copy of the float weights. A method says
which parameters it trains (`parameter_groups`) and what it compares (`loss`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.modules import QuantLayer
from trtq.train.trajectories import Trajectories

__all__ = ["Distillation", "Rates"]

_SCALE_RANGE = 4.0


@dataclass(frozen=True)
class Rates:
    """Learning rates at the first iteration; all decay linearly to zero.

    Attributes:
        lora: times the layer's mean weight step, for `lora_A` and `lora_B`. 1/2500 as released.
        weight_scale: of the weight steps.
        activation: of activation scales and zero points.
        activation_relative: multiply `activation` by the layer's mean activation scale.
        tuned: times the layer's mean weight step, for tuned weights and biases.
    """

    lora: float
    weight_scale: float
    activation: float
    activation_relative: bool = False
    tuned: float = 0.0


class Distillation:
    """An `Objective` of `trtq.train.loop` without its loss; not used by itself.

    Args:
        model: the quantised denoiser, teacher and student at once.
        trajectories: where both are compared.
        rates: learning rates.
    """

    def __init__(self, model: QuantizedDenoiser, trajectories: Trajectories, rates: Rates) -> None:
        self.model = model
        self.trajectories = trajectories
        self.rates = rates
        self._calibrated = {
            path: quantizer.scale.detach().clone() for path, quantizer in model.activations()
        }

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; what is in none of them stays as it is."""

    @abstractmethod
    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """The loss of accumulation step `slot`, a scalar."""

    def adapter_groups(self, layers: Iterable[QuantLayer]) -> list[dict[str, Any]]:
        """Adapters at a rate per layer, and all weight steps at one rate.

        Scale-aware optimisation (EfficientDM, eq. 8) multiplies an adapter's gradient by the layer's
        mean weight step. Adam cancels such a factor, so it is done as the release does it: as a
        learning rate per layer.
        """
        adapters: list[dict[str, Any]] = []
        steps: list[Tensor] = []
        for layer in layers:
            if layer.lora_A is None or layer.lora_B is None:
                continue
            rate = self.rates.lora * float(layer.weight_scale.detach().mean())
            adapters.append({"params": [layer.lora_A, layer.lora_B], "lr": rate})
            steps.append(layer.weight_scale)
            if layer.weight_scale_dequant is not None:
                steps.append(layer.weight_scale_dequant)
        return [*adapters, {"params": steps, "lr": self.rates.weight_scale}] if steps else []

    def tuned_groups(self, layers: Iterable[QuantLayer]) -> list[dict[str, Any]]:
        """Tuned weights and biases at a rate per layer."""
        groups: list[dict[str, Any]] = []
        for layer in layers:
            parameters = [p for p in (layer.tuned_weight, layer.tuned_bias) if p is not None]
            rate = self.rates.tuned * float(layer.weight_scale.detach().mean())
            groups.append({"params": parameters, "lr": rate})
        return groups

    def activation_groups(self, paths: Collection[str]) -> list[dict[str, Any]]:
        """Scales, and zero points that are not frozen, of the quantisers at these paths."""
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

    def after_update(self) -> None:
        """Keep zero points inside the codes and scales near their calibrated values.

        An entry is visited once per trajectory, while Adam's momentum moves it all the time: without
        a bound one layer whose scale hardly matters can run away to zero.
        """
        for path, quantizer in self.model.activations():
            calibrated = self._calibrated[path]
            quantizer.clamp_(calibrated / _SCALE_RANGE, calibrated * _SCALE_RANGE)

    def state(self) -> dict[str, Tensor]:
        """The trajectories in flight."""
        return self.trajectories.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the trajectories where `state` left them."""
        self.trajectories.load_state(state)
