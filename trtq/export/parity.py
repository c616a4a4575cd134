"""Does the exported graph say what torch says? Compared at every calibrated step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.sampling import Conditions, predict, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import NonFiniteError

__all__ = ["parity_db", "snr_db"]


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-noise ratio of `other` against `reference`, in dB; infinite when they are equal."""
    noise = (other.double() - reference.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def parity_db(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
) -> list[float]:
    """SNR of the exported prediction at every step of the reference's trajectory, cleanest first.

    Beyond each single step, one batch in which every item stands at another step is compared too;
    its value is the last of the list.

    Args:
        reference: the torch denoiser.
        exported: the same, from the graph.
        schedule: the calibrated steps.
        noise: where the trajectories start, `[B,C,H,W]`.
        conditions: of the B images.

    Raises:
        NonFiniteError: the graph gives NaN or infinity.
    """
    rows = []
    points = list(walk(reference, schedule, noise, conditions))
    for point in points:
        other = predict(exported, point.x, point.timestep, conditions)
        if not bool(torch.isfinite(other).all()):
            raise NonFiniteError(f"the graph gives NaN or infinity at timestep {point.timestep:g}")
        rows.append(snr_db(point.predicted, other))
    rows.reverse()
    count = len(noise)
    chosen = [points[index * len(points) // count] for index in range(count)]
    mixed = torch.stack([point.x[index] for index, point in enumerate(chosen)])
    timesteps = torch.tensor([point.timestep for point in chosen])
    with torch.no_grad():
        together = predict(reference, mixed, timesteps, conditions)
        rows.append(snr_db(together, predict(exported, mixed, timesteps, conditions)))
    return rows
