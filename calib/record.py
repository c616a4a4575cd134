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
        images: trajectories that were walked.
    """

    low: Tensor
    high: Tensor
    sample: Tensor
    images: int = 0

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Estimates of the smallest and largest value of any image, `low[T]` and `high[T]`.

        The largest of n draws underestimates the end of the distribution. For a uniform one the
        unbiased estimate of least variance is `(1 + 1/n)` times the largest draw (Goodman 1952,
        doi 10.1080/01621459.1952.10501182). At 64 images it is 1.6 % wider; where only a few images
        are walked, it keeps the inputs of other images from being clipped.
        """
        share = 1 + 1 / self.images if self.images else 1.0
        return self.low * share, self.high * share


def _hook(
    name: str,
    operand: int,
    recording: Recording,
    where: dict[str, int],
    share: int,
    generator: torch.Generator,
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[operand].detach().float().cpu().reshape(-1)
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
    layers: Sequence[LayerPlan],
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
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Recording]:
    """Walk the float model's trajectories and look at what enters each layer.

    Every input is filed under its own timestep; with guidance both halves are seen. The result goes by
    the path of the input's quantiser, e.g. `mid_block.resnets.0.conv1.activation`.

    Args:
        denoiser: the float model; it is not changed.
        layers: those to look at; float ones and those that use another's quantiser are passed over.
        schedule: the trajectory.
        table: the calibrated timesteps; those of the schedule.
        conditions: of all images.
        shape: of one sample, (C, H, W).
        images: number of trajectories.
        batch: trajectories walked at once.
        samples_per_step: values S kept per layer and step.
        seed: of the starting noise and of the choice of values.
        guidance: classifier-free guidance of the trajectory.
        device: where the denoiser is.
        progress: called with (steps done, steps in all).

    Raises:
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    batches = -(-images // batch)
    share = -(-samples_per_step // batches)
    recordings: dict[str, Recording] = {}
    where = {"index": 0, "batch": 0}
    generator = seeded_generator(seed, "recorded values")
    modules = dict(denoiser.named_modules())
    handles = []
    for plan in layers:
        if plan.input_of is not None:
            continue
        for position, operand in enumerate(plan.operands):
            seen = recordings[f"{plan.name}.{operand}"] = Recording(
                torch.full((len(table),), torch.inf),
                torch.full((len(table),), -torch.inf),
                torch.zeros(len(table), batches * share),
                images,
            )
            hook = _hook(plan.name, position, seen, where, share, generator)
            handles.append(modules[plan.name].register_forward_pre_hook(hook))

    def located(**inputs: Any) -> Any:
        where["index"] = int(table.index(inputs["timestep"])[0])
        return denoiser(**inputs)

    try:
        for where["batch"] in range(batches):
            first = where["batch"] * batch
            count = min(batch, images - first)
            noise = seeded_noise(shape, seed, first, count, "calibration").to(device)
            chosen = conditions.take(slice(first, first + count)).to(device)
            for point in walk(located, schedule.to(device), noise, chosen, guidance):
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
    """Scales and zero points of every activation quantiser.

    Args:
        recordings: what `record` saw.
        plans: the layers and their bits.
        method: `minmax` or `search`.
        static: one entry for all steps instead of one per step.
        progress: called with (layers done, layers in all).

    Returns:
        `(scale[T], zero_point[T])` by path of the quantiser; T = 1 when static. Ranges contain zero, so
        that float zero is a code. A layer that uses another's quantiser has none.
    """
    tables = {}
    quantized = [plan for plan in plans if plan.quantized and plan.input_of is None]
    for done, plan in enumerate(quantized):
        if progress is not None:
            progress(done + 1, len(quantized))
        for operand, bits in plan.operands.items():
            path = f"{plan.name}.{operand}"
            seen = recordings[path]
            low, high, sample = seen.low, seen.high, seen.sample
            if method == "minmax":
                low, high = seen.extremes()
            if static:
                low, high, sample = low.amin()[None], high.amax()[None], sample.reshape(1, -1)
            with named_errors(plan.name):
                tables[path] = row_qparams(
                    sample, low, high, bits, method, symmetric=bits == 8, contain_zero=True
                )
    return tables
