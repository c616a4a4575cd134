"""Training points: samples along the float model's sampling trajectories.

A trajectory starts at pure noise and follows the teacher's predictions, so no image is needed
(EfficientDM, arXiv 2310.03270, eq. 7). Letters: B images per micro-batch; C, H, W channels, height,
width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.sampling import Conditions, predict
from trtq.diffusion.schedule import NoiseSchedule
from trtq.seeds import seeded_generator

__all__ = ["Batch", "Trajectories"]


@dataclass(frozen=True)
class Batch:
    """Inputs of the denoiser with the teacher's predictions.

    Attributes:
        x: noisy samples, `[B,C,H,W]`.
        timestep: timesteps of the samples, `[B]`.
        conditions: conditions of the B samples.
        teacher: the teacher's guided prediction, `[B,C,H,W]`.
        weight: weight of an error at each item's step, `[B]`.
    """

    x: Tensor
    timestep: Tensor
    conditions: Conditions
    teacher: Tensor
    weight: Tensor


class _Pool:
    """B trajectories of the teacher at the positions `position`, LongTensor[B], of the schedule."""

    def __init__(self, x: Tensor, position: Tensor, conditions: Conditions) -> None:
        self.x = x
        self.position = position
        self.conditions = conditions


class Trajectories:
    """B trajectories per micro-batch slot; every batch advances them by one denoising step.

    Args:
        teacher: float denoiser.
        schedule: noise schedule with the timesteps of the tables.
        shape: shape (C, H, W) of one sample.
        draw_conditions: function `(count, generator) -> Conditions` that chooses random conditions.
        batch: number B of images per micro-batch.
        slots: number of micro-batches per update in this process.
        stream: first random stream of this process; slot s uses stream `stream + s * stride`.
        stride: number of processes.
        seed: seed of all random numbers.
        purpose: name that separates the random numbers of different stages.
        guidance: classifier-free guidance scale of the teacher.
        eta: amount of fresh noise in the teacher's DDIM steps, 0 .. 1.
        staggered: whether to spread the items of all micro-batches of an update over the schedule; if
            not, all items are at the same step.
        weighted: whether to weight errors by their effect on the final sample
            (`NoiseSchedule.influence`); if not, all steps have weight 1.
        device: device of the teacher; random numbers are generated on the CPU, so they do not depend on
            it.
    """

    def __init__(
        self,
        teacher: Callable[..., Any],
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        draw_conditions: Callable[[int, torch.Generator], Conditions],
        *,
        batch: int,
        slots: int = 1,
        stream: int = 0,
        stride: int = 1,
        seed: int = 0,
        purpose: str = "efficientdm",
        guidance: float = 1.0,
        eta: float = 1.0,
        staggered: bool = True,
        weighted: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.teacher = teacher
        self.schedule = schedule.to(device)
        self.device = device
        self.shape = shape
        self.draw_conditions = draw_conditions
        self.batch = batch
        self.streams = [stream + slot * stride for slot in range(slots)]
        self._all_streams = slots * stride
        self.seed = seed
        self.purpose = purpose
        self.guidance = guidance
        self.eta = eta
        self.staggered = staggered
        self._weights = (
            self.schedule.influence() if weighted else torch.ones(len(schedule), device=device)
        )
        self._pools: list[_Pool] = []

    def next(self, slot: int, iteration: int) -> Batch:
        """Return the current points of this slot's trajectories, then advance them.

        Args:
            slot: index of the micro-batch in the update.
            iteration: index of the update.
        """
        if not self._pools:
            self._pools = [self._new_pool(index) for index in range(len(self.streams))]
        pool = self._pools[slot]
        generator = self._generator(slot, iteration)
        teacher = self._teach(pool.x, pool.position, pool.conditions)
        timestep = self.schedule.timesteps[pool.position]
        batch = Batch(pool.x, timestep, pool.conditions, teacher, self._weights[pool.position])
        self._advance(pool, teacher, generator)
        return batch

    def predict(self, student: Callable[..., Any], batch: Batch) -> Tensor:
        """The student's guided prediction for a batch, `[B,C,H,W]`.

        Args:
            student: callable that computes the student's prediction.
            batch: inputs of the denoiser.
        """
        return predict(student, batch.x, batch.timestep, batch.conditions, self.guidance)

    def _generator(self, slot: int, iteration: int) -> torch.Generator:
        return seeded_generator(self.seed, self.purpose, self.streams[slot], iteration)

    def _new_pool(self, slot: int) -> _Pool:
        """Create trajectories; if staggered, the teacher first advances the items."""
        generator = self._generator(slot, -1)
        pool = _Pool(
            self._noise(self.batch, generator),
            torch.zeros(self.batch, dtype=torch.long, device=self.device),
            self.draw_conditions(self.batch, generator).to(self.device),
        )
        if self.staggered:
            # Positions are spread over all processes and slots, so each update covers the schedule.
            place = torch.arange(self.batch, device=self.device) * self._all_streams
            place += self.streams[slot]
            places = place * len(self.schedule) // (self.batch * self._all_streams)
            for position in range(int(places.max())):
                late = places > position
                teacher = self._teach(pool.x[late], pool.position[late], pool.conditions.take(late))
                noise = self._noise(int(late.sum()), generator)
                pool.x[late] = self.schedule.step(
                    pool.x[late], teacher, pool.position[late], self.eta, noise
                )
                pool.position[late] += 1
        return pool

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn((count, *self.shape), generator=generator).to(self.device)

    def _teach(self, x: Tensor, position: Tensor, conditions: Conditions) -> Tensor:
        timestep = self.schedule.timesteps[position]
        # The teacher predicts in float32, independently of the student's training precision.
        with torch.autocast(x.device.type, enabled=False):
            return predict(self.teacher, x, timestep, conditions, self.guidance)

    def _advance(self, pool: _Pool, teacher: Tensor, generator: torch.Generator) -> None:
        noise = self._noise(self.batch, generator)
        stepped = self.schedule.step(pool.x, teacher, pool.position, self.eta, noise)
        position = pool.position + 1
        finished = position >= len(self.schedule)
        if bool(finished.any()):
            fresh = self._noise(self.batch, generator)
            stepped = torch.where(finished.reshape(-1, *(1,) * len(self.shape)), fresh, stepped)
            position = position.masked_fill(finished, 0)
            conditions = self.draw_conditions(self.batch, generator).to(self.device)
            pool.conditions = pool.conditions.update(finished, conditions)
        pool.x, pool.position = stepped, position

    def state(self) -> dict[str, Tensor]:
        """The state of the current trajectories."""
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
        """Restore the trajectories of `state`."""
        self._pools = []
        for slot in range(len(self.streams)):
            halves: dict[str, dict[str, Tensor]] = {"conditional": {}, "unconditional": {}}
            for key, value in state.items():
                place, half, *name = key.split(".", 2)
                if place == str(slot) and name:
                    halves[half][name[0]] = value
            conditions = replace(
                self.draw_conditions(1, self._generator(slot, -1)),
                conditional=halves["conditional"],
                unconditional=halves["unconditional"] or None,
            )
            x, position = state[f"{slot}.x"].to(self.device), state[f"{slot}.position"]
            self._pools.append(_Pool(x, position.to(self.device), conditions.to(self.device)))
