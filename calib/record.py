"""What the inputs of the layers look like along the float model's own trajectory, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.sampling import Conditions, seeded_noise, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import NonFiniteError
from trtq.quant.convert import LayerPlan, named_errors
from trtq.quant.ranges import Method, row_qparams
from trtq.quant.timestep import TimestepTable
from trtq.seeds import seeded_generator

__all__ = ["Recording", "activation_tables", "record"]


@dataclass
class Recording:
    """The inputs of one layer; T steps, S kept values per step, index 0 = cleanest.

    Attributes:
        low: smallest value seen, `[T]`.
        high: largest value seen, `[T]`.
        sample: values drawn at random from all inputs of the step, `[T, S]`.
    """

    low: Tensor
    high: Tensor
    sample: Tensor
    filled: int = 0


def _hook(
    name: str, recording: Recording, where: dict[str, int], share: int, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().float().reshape(-1)
        low, high = torch.aminmax(x)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(
                f"layer {name!r}: its input holds NaN or infinity at step {where['index']}; "
                "the float model itself is broken there"
            )
        index, start = where["index"], where["batch"] * share
        recording.low[index] = torch.minimum(recording.low[index], low)
        recording.high[index] = torch.maximum(recording.high[index], high)
        slot = recording.sample[index, start : start + share]
        slot.copy_(x[torch.randint(len(x), (len(slot),), generator=generator)])

    return keep


def record(
    denoiser: nn.Module,
    layers: Sequence[str],
    schedule: NoiseSchedule,
    table: TimestepTable,
    conditions: Conditions,
    shape: tuple[int, ...],
    *,
    images: int,
    batch: int,
    samples_per_step: int,
    seed: int,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Recording]:
    """Walk the float model's trajectories and look at what enters each layer.

    Every input is filed under its own timestep; with guidance both halves are seen.

    Args:
        denoiser: the float model; it is not changed.
        layers: module paths to look at.
        schedule: the trajectory.
        table: the calibrated timesteps; those of the schedule.
        conditions: of all images.
        shape: of one sample, (C, H, W).
        images: number of trajectories.
        batch: trajectories walked at once.
        samples_per_step: values S kept per layer and step.
        seed: of the starting noise and of the choice of values.
        guidance: classifier-free guidance of the trajectory.
        progress: called with (steps done, steps in all).

    Raises:
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    batches = -(-images // batch)
    share = -(-samples_per_step // batches)
    recordings = {
        name: Recording(
            torch.full((len(table),), torch.inf),
            torch.full((len(table),), -torch.inf),
            torch.zeros(len(table), batches * share),
        )
        for name in layers
    }
    where = {"index": 0, "batch": 0}
    generator = seeded_generator(seed, "recorded values")
    modules = dict(denoiser.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            _hook(name, recordings[name], where, share, generator)
        )
        for name in layers
    ]

    def located(x: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        where["index"] = int(table.index(timestep)[0])
        return denoiser(x, timestep, *args, **kwargs)

    try:
        for where["batch"] in range(batches):
            first = where["batch"] * batch
            count = min(batch, images - first)
            noise = seeded_noise(shape, seed, first, count)
            chosen = conditions.take(slice(first, first + count))
            for point in walk(located, schedule, noise, chosen, guidance):
                if progress is not None:
                    done = where["batch"] * len(schedule) + point.position + 1
                    progress(done, batches * len(schedule))
    finally:
        for handle in handles:
            handle.remove()
    return recordings


def activation_tables(
    recordings: Mapping[str, Recording],
    plans: Sequence[LayerPlan],
    method: Method,
    *,
    static: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales and zero points of every quantised layer.

    Args:
        recordings: what `record` saw.
        plans: the layers and their bits.
        method: `minmax` or `search`.
        static: one entry for all steps instead of one per step.
        progress: called with (layers done, layers in all).

    Returns:
        `(scale[T], zero_point[T])` by layer; T = 1 when static. Ranges contain zero, so that float
        zero is a code.
    """
    tables = {}
    quantized = [plan for plan in plans if plan.quantized]
    for done, plan in enumerate(quantized):
        if plan.activation_bits is None:
            continue
        if progress is not None:
            progress(done + 1, len(quantized))
        seen = recordings[plan.name]
        low, high, sample = seen.low, seen.high, seen.sample
        if static:
            low, high, sample = low.amin()[None], high.amax()[None], sample.reshape(1, -1)
        with named_errors(plan.name):
            tables[plan.name] = row_qparams(
                sample,
                low,
                high,
                plan.activation_bits,
                method,
                symmetric=plan.activation_bits == 8,
                contain_zero=True,
            )
    return tables
