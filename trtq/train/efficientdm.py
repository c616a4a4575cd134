"""EfficientDM (arXiv 2310.03270): QALoRA and per-step scales, distilled without data.

The teacher is the student's own float weights. Both look at the same points of the teacher's sampling
trajectory, which starts at pure noise, so no image is needed:

    loss = sum || student(x_t, t) - teacher(x_t, t) ||^2        (eq. 7, summed as released)
    x_{t-1} = DDIM step with the *teacher's* prediction

Scale-aware optimisation (eq. 8) multiplies an adapter's gradient by the layer's mean weight step.
Adam cancels such a factor, so it is done as the release does it: as a learning rate per layer.

Letters: B images per micro-batch, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.sampling import Conditions, predict
from trtq.diffusion.schedule import NoiseSchedule
from trtq.quant.convert import QuantizedDenoiser
from trtq.seeds import seeded_generator

__all__ = ["EfficientDM", "Rates", "guided_error"]

_SCALE_RANGE = 4.0


def guided_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences of two guided predictions (EfficientDM, eq. 7, as released)."""
    return (student - teacher).square().sum()


@dataclass(frozen=True)
class Rates:
    """Learning rates at the first iteration; all decay linearly to zero.

    Attributes:
        lora: times the layer's mean weight step, for `lora_A` and `lora_B`. 1/2500 as released.
        weight_scale: of the weight steps.
        activation: of activation scales and zero points.
        activation_relative: multiply `activation` by the layer's mean activation scale.
    """

    lora: float
    weight_scale: float
    activation: float
    activation_relative: bool = False


class _Pool:
    """B trajectories of the teacher, each at a position of its own; LongTensor position[B]."""

    def __init__(self, x: Tensor, position: Tensor, conditions: Conditions) -> None:
        self.x = x
        self.position = position
        self.conditions = conditions


class EfficientDM:
    """The method as an `Objective` of `trtq.train.loop`.

    Args:
        model: the quantised denoiser, teacher and student at once.
        schedule: the teacher's trajectory; its timesteps are those of the tables.
        shape: of one sample, (C, H, W).
        draw_conditions: `(count, generator) -> Conditions`.
        rates: learning rates.
        batch: images B per micro-batch.
        slots: accumulation steps of this process.
        stream: first of the `slots` random streams of this process; they are `stream + slot * stride`.
        stride: number of processes.
        seed: of all randomness.
        guidance: classifier-free guidance of teacher and student.
        eta: noise of the teacher's DDIM steps.
        staggered: each item of a batch stands at a step of its own; otherwise all stand at one step.
    """

    def __init__(
        self,
        model: QuantizedDenoiser,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        draw_conditions: Callable[[int, torch.Generator], Conditions],
        rates: Rates,
        *,
        batch: int,
        slots: int = 1,
        stream: int = 0,
        stride: int = 1,
        seed: int = 0,
        guidance: float = 1.0,
        eta: float = 1.0,
        staggered: bool = True,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.shape = shape
        self.draw_conditions = draw_conditions
        self.rates = rates
        self.batch = batch
        self.streams = [stream + slot * stride for slot in range(slots)]
        self.seed = seed
        self.guidance = guidance
        self.eta = eta
        self.staggered = staggered
        self._pools: list[_Pool] = []
        self._calibrated = {
            name: layer.activation.scale.detach().clone() for name, layer in model.layers()
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Per layer: adapters at their own rate, then weight steps and activation entries."""
        adapters: list[dict[str, Any]] = []
        weight_steps: list[Tensor] = []
        activation: dict[float, list[Tensor]] = {}
        for _, layer in self.model.layers():
            if layer.lora_A is None or layer.lora_B is None:
                # 8-bit layers are left as calibrated, as released.
                layer.requires_grad_(False)
                continue
            mean_step = float(layer.weight_scale.detach().mean())
            adapters.append(
                {"params": [layer.lora_A, layer.lora_B], "lr": self.rates.lora * mean_step}
            )
            weight_steps.append(layer.weight_scale)
            if layer.weight_scale_dequant is not None:
                weight_steps.append(layer.weight_scale_dequant)
            rate = self.rates.activation
            if self.rates.activation_relative:
                rate *= float(layer.activation.scale.detach().mean())
            entries = activation.setdefault(rate, [])
            entries += [p for p in layer.activation.parameters() if p.requires_grad]
        return [
            *adapters,
            {"params": weight_steps, "lr": self.rates.weight_scale},
            *({"params": entries, "lr": rate} for rate, entries in activation.items()),
        ]

    def _generator(self, slot: int, iteration: int) -> torch.Generator:
        return seeded_generator(self.seed, "efficientdm", self.streams[slot], iteration)

    def _new_pool(self, slot: int) -> _Pool:
        """Fresh noise; with staggered steps the teacher first walks each item to its place."""
        generator = self._generator(slot, -1)
        x = torch.randn((self.batch, *self.shape), generator=generator)
        pool = _Pool(
            x,
            torch.zeros(self.batch, dtype=torch.long),
            self.draw_conditions(self.batch, generator),
        )
        if self.staggered:
            places = torch.arange(self.batch) * len(self.schedule) // self.batch
            for position in range(int(places.max())):
                late = places > position
                teacher = self._teach(pool.x[late], pool.position[late], pool.conditions.take(late))
                noise = torch.randn(pool.x[late].shape, generator=generator)
                pool.x[late] = self.schedule.step(
                    pool.x[late], teacher, pool.position[late], self.eta, noise
                )
                pool.position[late] += 1
        return pool

    def _teach(self, x: Tensor, position: Tensor, conditions: Conditions) -> Tensor:
        timestep = self.schedule.timesteps[position]
        return predict(self.model.teacher, x, timestep, conditions, self.guidance)

    def loss(self, student: Callable[..., Any], slot: int, iteration: int) -> Tensor:
        """The squared error at the pool's points; then the teacher moves every item one step on."""
        if not self._pools:
            self._pools = [self._new_pool(index) for index in range(len(self.streams))]
        pool = self._pools[slot]
        generator = self._generator(slot, iteration)
        target = self._teach(pool.x, pool.position, pool.conditions)
        timestep = self.schedule.timesteps[pool.position]
        predicted = predict(student, pool.x, timestep, pool.conditions, self.guidance)
        self._advance(pool, target, generator)
        return guided_error(predicted.float(), target)

    def _advance(self, pool: _Pool, target: Tensor, generator: torch.Generator) -> None:
        noise = torch.randn(pool.x.shape, generator=generator)
        stepped = self.schedule.step(pool.x, target, pool.position, self.eta, noise)
        position = pool.position + 1
        finished = position >= len(self.schedule)
        if bool(finished.any()):
            fresh = torch.randn(pool.x.shape, generator=generator)
            stepped = torch.where(finished.reshape(-1, *(1,) * len(self.shape)), fresh, stepped)
            position = position.masked_fill(finished, 0)
            conditions = self.draw_conditions(self.batch, generator)
            pool.conditions = pool.conditions.replace(finished, conditions)
        pool.x, pool.position = stepped, position

    def after_step(self) -> None:
        """Keep zero points inside the codes and scales near their calibrated values.

        An entry is visited once per trajectory, while Adam's momentum moves it all the time: without
        a bound one layer whose scale hardly matters can run away to zero.
        """
        for name, layer in self.model.layers():
            calibrated = self._calibrated[name]
            layer.activation.clamp_(calibrated / _SCALE_RANGE, calibrated * _SCALE_RANGE)

    def state(self) -> dict[str, Tensor]:
        """The trajectories in flight."""
        tensors = {}
        for slot, pool in enumerate(self._pools):
            tensors[f"{slot}.x"] = pool.x
            tensors[f"{slot}.position"] = pool.position
            for half, values in (
                ("conditional", pool.conditions.conditional),
                ("unconditional", pool.conditions.unconditional or {}),
            ):
                for name, value in values.items():
                    tensors[f"{slot}.{half}.{name}"] = value
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the trajectories where `state` left them."""
        self._pools = []
        for slot in range(len(self.streams)):
            halves: dict[str, dict[str, Tensor]] = {"conditional": {}, "unconditional": {}}
            for key, value in state.items():
                place, half, *name = key.split(".", 2)
                if place == str(slot) and name:
                    halves[half][name[0]] = value
            conditions = Conditions(halves["conditional"], halves["unconditional"] or None)
            self._pools.append(_Pool(state[f"{slot}.x"], state[f"{slot}.position"], conditions))
