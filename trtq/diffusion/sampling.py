"""Guidance, initial noise and denoising trajectories.

Letters: B images; C, H, W channels, height and width; T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.families import FAMILIES, Family
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import UsageError
from trtq.seeds import seeded_generator

__all__ = [
    "Conditions",
    "TrajectoryPoint",
    "at_once",
    "predict",
    "seeded_noise",
    "spread",
    "walk",
]

Denoiser = Callable[..., Any]
_VALUES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Conditions:
    """Inputs of a denoiser other than the sample and the timestep.

    Attributes:
        conditional: inputs by flat name, `[B, ...]` each.
        unconditional: the same inputs for "no condition"; None: the model has no such inputs.
        shared: inputs without a batch axis, by flat name.
        family: calling convention of the denoiser.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    family: Family = FAMILIES["UNet2DModel"]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Apply a function to all values with a batch axis."""
        unconditional = self.unconditional
        return replace(
            self,
            conditional={name: change(value) for name, value in self.conditional.items()},
            unconditional=unconditional
            and {name: change(value) for name, value in unconditional.items()},
        )

    def take(self, items: Tensor | slice) -> Conditions:
        """The conditions of a selection of the images."""
        return self._each(lambda value: value[items])

    def to(self, device: torch.device | str) -> Conditions:
        """The same conditions with their tensors on `device`."""
        shared = {name: value.to(device) for name, value in self.shared.items()}
        return replace(self._each(lambda value: value.to(device)), shared=shared)

    def update(self, where: Tensor, other: Conditions) -> Conditions:
        """The conditions of `other` for images where `where[B]` is true, these conditions elsewhere."""

        def select(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.where(where.reshape(-1, *(1,) * (value.ndim - 1)), new[name], value)
                for name, value in old.items()
            }

        unconditional = None
        if self.unconditional is not None and other.unconditional is not None:
            unconditional = select(self.unconditional, other.unconditional)
        conditional = select(self.conditional, other.conditional)
        return replace(self, conditional=conditional, unconditional=unconditional)


def predict(
    denoiser: Denoiser,
    x: Tensor,
    timestep: Tensor | float,
    conditions: Conditions,
    guidance: float = 1.0,
) -> Tensor:
    """The denoiser's prediction, optionally with classifier-free guidance (arXiv 2207.12598).

    With guidance, unconditional and conditional inputs form one batch, in this order.

    Args:
        denoiser: callable that takes the inputs of its family by name and `return_dict=False`.
        x: noisy samples, `[B,C,H,W]`.
        timestep: one timestep for all images, or one per image, `[B]`.
        conditions: conditions of the B images.
        guidance: guidance scale; 1 or less disables it, as in diffusers.

    Returns:
        `e_u + guidance * (e_c - e_u)`, `[B,C,H,W]`, without the channels of a learned variance.

    Raises:
        UsageError: guidance is requested for a model without an unconditional prediction.
    """
    channels = x.shape[1]
    family, shared = conditions.family, conditions.shared
    if guidance <= 1.0:
        arguments = family.arguments(x, timestep, conditions.conditional | shared)
        out: Tensor = denoiser(**arguments, return_dict=False)[0]
        return out[:, :channels]
    if conditions.unconditional is None:
        raise UsageError(
            f"guidance={guidance:g} requires a model that also predicts without a condition, e.g. with "
            "a class that means 'no class'; use guidance=1"
        )
    both = {
        name: torch.cat([conditions.unconditional[name], value])
        for name, value in conditions.conditional.items()
    }
    timestep = torch.as_tensor(timestep, device=x.device)
    if timestep.ndim == 1 and len(timestep) > 1:
        timestep = torch.cat([timestep, timestep])
    arguments = family.arguments(torch.cat([x, x]), timestep, both | shared)
    out = denoiser(**arguments, return_dict=False)[0]
    without, with_condition = out[:, :channels].chunk(2)
    return without + guidance * (with_condition - without)


def seeded_noise(
    shape: tuple[int, ...], seed: int, first: int, count: int, purpose: str = "image"
) -> Tensor:
    """Initial noise of the images `first .. first + count - 1`, `[count, *shape]`.

    Image i of a seed does not depend on the batch. Noise differs between purposes, so calibration and
    evaluation use different images.

    Args:
        shape: shape of one sample.
        seed: seed of the run.
        first: index of the first image.
        count: number of images.
        purpose: use of the noise, e.g. `image`.
    """
    return torch.stack(
        [
            torch.randn(shape, generator=seeded_generator(seed, purpose, first + i))
            for i in range(count)
        ]
    )


def at_once(shape: tuple[int, ...], max_batch: int) -> int:
    """Number of samples of this shape per denoiser call, in 1 .. `max_batch`.

    Activations of a UNet take about ten thousand times the memory of its input: four images at Stable
    Diffusion's size take several gigabytes.

    Args:
        shape: shape of one sample.
        max_batch: maximum number of samples per call.
    """
    return max(1, min(max_batch, _VALUES_AT_ONCE // math.prod(shape)))


@dataclass(frozen=True)
class TrajectoryPoint:
    """One step of a trajectory.

    Attributes:
        position: index of the step, 0 = noisiest.
        timestep: timestep of the step, in the scheduler's units.
        x: denoiser input, `[B,C,H,W]`.
        predicted: denoiser output with guidance, `[B,C,H,W]`.
    """

    position: int
    timestep: float
    x: Tensor
    predicted: Tensor


@torch.no_grad()
def spread(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Take samples from all steps of the denoiser's trajectories.

    Item i of B is at step `i * T // B`.

    Args:
        denoiser: see `predict`.
        schedule: noise schedule of T steps.
        noise: initial noise, `[B,C,H,W]`.
        conditions: conditions of the B images.
        guidance: guidance scale; 1 or less disables it.

    Returns:
        Denoiser inputs `[B,C,H,W]` and their timesteps `[B]`.
    """
    position = torch.arange(len(noise), device=noise.device) * len(schedule) // len(noise)
    x = torch.empty_like(noise)
    for point in walk(denoiser, schedule, noise, conditions, guidance):
        here = position == point.position
        x[here] = point.x[here]
    return x, schedule.timesteps.to(noise.device)[position]


@torch.no_grad()
def walk(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    conditions: Conditions,
    guidance: float = 1.0,
) -> Iterator[TrajectoryPoint]:
    """Run the deterministic denoising loop from initial noise.

    Args:
        denoiser: see `predict`.
        schedule: noise schedule.
        x: initial noise, `[B,C,H,W]`.
        conditions: conditions of the B images.
        guidance: guidance scale; 1 or less disables it.

    Yields:
        The denoiser's input and output at each step.
    """
    for position, timestep in enumerate(schedule.timesteps.tolist()):
        predicted = predict(denoiser, x, timestep, conditions, guidance)
        yield TrajectoryPoint(position, timestep, x, predicted)
        x = schedule.step(x, predicted, torch.full((len(x),), position))
