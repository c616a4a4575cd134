"""Guidance, and walking a denoising trajectory. Letters: B images, C, H, W."""

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
    """What a denoiser needs to know beside the sample and the timestep.

    Attributes:
        conditional: inputs by flat name, each a tensor `[B, ...]`.
        unconditional: the same for "no condition"; None if the model has no such thing.
        shared: inputs without a batch axis.
        family: how the denoiser is called.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    family: Family = FAMILIES["UNet2DModel"]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """These conditions with every value with a batch axis changed."""
        unconditional = self.unconditional
        return replace(
            self,
            conditional={name: change(value) for name, value in self.conditional.items()},
            unconditional=unconditional
            and {name: change(value) for name, value in unconditional.items()},
        )

    def take(self, items: Tensor | slice) -> Conditions:
        """The conditions of some of the images."""
        return self._each(lambda value: value[items])

    def to(self, device: torch.device | str) -> Conditions:
        """The conditions on a device."""
        shared = {name: value.to(device) for name, value in self.shared.items()}
        return replace(self._each(lambda value: value.to(device)), shared=shared)

    def update(self, where: Tensor, other: Conditions) -> Conditions:
        """These conditions, with those of `other` where `where[B]` is true."""

        def pick(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.where(where.reshape(-1, *(1,) * (value.ndim - 1)), theirs[name], value)
                for name, value in mine.items()
            }

        unconditional = None
        if self.unconditional is not None and other.unconditional is not None:
            unconditional = pick(self.unconditional, other.unconditional)
        conditional = pick(self.conditional, other.conditional)
        return replace(self, conditional=conditional, unconditional=unconditional)


def predict(
    denoiser: Denoiser,
    x: Tensor,
    timestep: Tensor | float,
    conditions: Conditions,
    guidance: float = 1.0,
) -> Tensor:
    """The denoiser's prediction, with classifier-free guidance (arXiv 2207.12598) when asked for.

    Both halves go through the denoiser as one batch, in the order unconditional, conditional.

    Args:
        denoiser: called with the inputs of its family by name, and `return_dict=False`.
        x: `[B,C,H,W]`.
        timestep: one for all, or `[B]`.
        conditions: of the B images.
        guidance: up to 1 is none, as in diffusers.

    Returns:
        `e_u + guidance * (e_c - e_u)`, `[B,C,H,W]`. A learned variance in further channels is cut.

    Raises:
        UsageError: guidance is asked of a model without an unconditional form.
    """
    channels = x.shape[1]
    family, shared = conditions.family, conditions.shared
    if guidance <= 1.0:
        arguments = family.arguments(x, timestep, conditions.conditional | shared)
        out: Tensor = denoiser(**arguments, return_dict=False)[0]
        return out[:, :channels]
    if conditions.unconditional is None:
        raise UsageError(
            f"guidance={guidance:g} needs a model that also predicts without a condition, e.g. with a "
            "class that means 'no class'"
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
    """Starting noise of images `first .. first + count - 1`, `[count, *shape]`.

    Image i of a seed is the same in whatever batch it is drawn; other purposes have other noise, so
    nothing is calibrated on what it is judged by.
    """
    return torch.stack(
        [
            torch.randn(shape, generator=seeded_generator(seed, purpose, first + i))
            for i in range(count)
        ]
    )


def at_once(shape: tuple[int, ...], most: int) -> int:
    """How many samples of this shape to put through a denoiser at once, at least 1 and at most `most`.

    Activations of a UNet take some ten thousand times the memory of its input: four images at Stable
    Diffusion's size are several gigabytes.
    """
    return max(1, min(most, _VALUES_AT_ONCE // math.prod(shape)))


@dataclass(frozen=True)
class TrajectoryPoint:
    """Where a trajectory stands.

    Attributes:
        position: 0 at the noisiest step.
        timestep: the scheduler's timestep.
        x: the denoiser's input, `[B,C,H,W]`.
        predicted: its guided output, `[B,C,H,W]`.
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
    """Points all along the denoiser's trajectories: item i of B stands at step `i * T // B`.

    Returns:
        Inputs `[B,C,H,W]` and their timesteps `[B]`.
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
    """Follow the denoiser's own deterministic trajectory from the noise `x[B,C,H,W]`."""
    for position, timestep in enumerate(schedule.timesteps.tolist()):
        predicted = predict(denoiser, x, timestep, conditions, guidance)
        yield TrajectoryPoint(position, timestep, x, predicted)
        x = schedule.step(x, predicted, torch.full((len(x),), position))
