"""Record the inputs of layers along the float model's trajectories, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trtq.calib.calibrators import EXTREMES, RangeData
from trtq.calib.finite import check_finite
from trtq.calib.histogram import StepHistograms
from trtq.calib.range_rows import RangeRows, input_rows
from trtq.diffusion.sampling import Conditions, seeded_noise, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.quant.hooks import input_hooks
from trtq.quant.plan import LayerPlan
from trtq.quant.timestep import TimestepTable
from trtq.seeds import seeded_generator

__all__ = [
    "LayerRecorder",
    "Recorder",
    "Recording",
    "observe_trajectories",
    "record",
]


@dataclass
class Recording:
    """The inputs of one layer: T steps, S sampled values per step; index 0 is the cleanest step.

    Attributes:
        low: smallest value at each step, `[T]`.
        high: largest value at each step, `[T]`.
        sample: random sample of the input values at each step, `[T, S]`.
        images: number of trajectories.
        histograms: histograms of the absolute values, one per step or one for all steps; None: not
            counted.
        rows: sampled rows; None: not sampled.
    """

    low: Tensor
    high: Tensor
    sample: Tensor
    images: int = 0
    histograms: StepHistograms | None = None
    rows: RangeRows | None = None

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Estimates of the smallest and largest value over all images, `low[T]` and `high[T]`.

        The maximum of n samples underestimates the end of the distribution. For a uniform distribution
        the unbiased estimate of minimum variance is `(1 + 1/n)` times the maximum (Goodman 1952, doi
        10.1080/01621459.1952.10501182). With 64 images the range becomes 1.6 % wider; with only a few
        images the margin prevents clipping of the inputs of other images.

        Returns:
            Estimated minima and maxima, `[T]` each.
        """
        share = 1 + 1 / self.images if self.images else 1.0
        return self.low * share, self.high * share


class Recorder(Protocol):
    """An observer of layer inputs.

    Attributes:
        step: index of the current denoising step, which the caller sets.
        batch: index of the current batch of trajectories, which the caller sets.
    """

    step: int
    batch: int

    @property
    def layers(self) -> list[str]:
        """The observed layers."""

    def observe(self, layer: str, inputs: tuple[Any, ...]) -> None:
        """Take the inputs of one call of a layer."""


class LayerRecorder:
    """Records extremes and samples of layer inputs by denoising step.

    Args:
        layers: layers to observe; layers that use another layer's quantiser are skipped.
        table: the calibrated timesteps.
        batches: number of batches of trajectories.
        share: number of sampled values per layer, step and batch.
        images: number of trajectories.
        seed: seed of the random sample.
        data: what else is recorded of each input.

    Attributes:
        step: index of the current denoising step.
        batch: index of the current batch of trajectories.
        recordings: recordings by path of the input quantiser.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        table: TimestepTable,
        batches: int,
        share: int,
        images: int,
        seed: int,
        data: RangeData = EXTREMES,
    ) -> None:
        self.step = self.batch = 0
        self.share = share
        self.recordings: dict[str, Recording] = {}
        self._visits: dict[tuple[str, int, int], int] = {}
        # Paths of the quantisers of each layer, in the order of the layer's arguments.
        self._paths: dict[str, list[str]] = {}
        # Whether a layer whose rows are sampled is linear.
        self._linear: dict[str, bool] = {}
        self._generator = seeded_generator(seed, "recorded values")
        for plan in layers:
            if plan.input_of is not None or not plan.operands:
                continue
            self._paths[plan.name] = [f"{plan.name}.{operand}" for operand in plan.operands]
            for path in self._paths[plan.name]:
                self.recordings[path] = Recording(
                    torch.full((len(table),), torch.inf),
                    torch.full((len(table),), -torch.inf),
                    torch.zeros(len(table), batches * share),
                    images,
                    StepHistograms(1 if data.static else len(table)) if data.histograms else None,
                )
            if data.rows and plan.weight_bits is not None and plan.format == "int":
                self._linear[plan.name] = plan.kind == "linear"
                for path in self._paths[plan.name]:
                    self.recordings[path].rows = RangeRows(len(table), seed)

    @property
    def layers(self) -> list[str]:
        """The observed layers."""
        return list(self._paths)

    def observe(self, layer: str, inputs: tuple[Any, ...]) -> None:
        """Record extremes and a sample of a layer's inputs.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
        """
        for path, x in zip(self._paths[layer], inputs, strict=False):
            x = x.detach().float().cpu()
            self._keep(layer, path, x.reshape(-1))
            rows = self.recordings[path].rows
            if rows is not None:
                rows.add(self.step, input_rows(x, linear=self._linear[layer]))

    def _keep(self, layer: str, path: str, x: Tensor) -> None:
        recording = self.recordings[path]
        low, high = torch.aminmax(x)
        check_finite(torch.stack([low, high]), layer, self.step)
        recording.low[self.step] = torch.minimum(recording.low[self.step], low)
        recording.high[self.step] = torch.maximum(recording.high[self.step], high)
        if recording.histograms is not None:
            recording.histograms.add(self.step, x)
        start = self.batch * self.share
        slot = recording.sample[self.step, start : start + self.share]
        drawn = x[torch.randint(len(x), (len(slot),), generator=self._generator)]
        place = (path, self.step, self.batch)
        visits = self._visits[place] = self._visits.get(place, 0) + 1
        if visits > 1:
            # A layer that is called again at a step, e.g. without the prompt: every call has the same
            # share of the sample (reservoir sampling).
            replaced = torch.rand(len(slot), generator=self._generator) < 1 / visits
            drawn = torch.where(replaced, drawn, slot)
        slot.copy_(drawn)


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
    data: RangeData = EXTREMES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Recording]:
    """Record the input of every layer along the float model's trajectories.

    Every input is recorded under its timestep, with guidance for both halves of the batch. Keys of the
    result are paths of input quantisers, e.g. `mid_block.resnets.0.conv1.activation`.

    Args:
        denoiser: the float model; it is not changed.
        layers: layers to record; float layers and layers that use another layer's quantiser are skipped.
        schedule: schedule of the trajectories.
        table: the calibrated timesteps, equal to those of the schedule.
        conditions: conditions of all images.
        shape: shape (C, H, W) of one sample.
        images: number of trajectories.
        batch: number of trajectories per denoiser call.
        samples_per_step: number S of sampled values per layer and step.
        seed: seed of the initial noise and of the random sample.
        guidance: classifier-free guidance scale of the trajectories.
        device: device of the denoiser.
        data: what else is recorded of each input, see `LayerRecorder`.
        progress: callback with the completed and the total number of steps.

    Raises:
        NonFiniteError: an input is NaN or infinite; the message names the layer.
    """
    batches = -(-images // batch)
    share = -(-samples_per_step // batches)
    recorder = LayerRecorder(layers, table, batches, share, images, seed, data)
    observe_trajectories(
        recorder,
        denoiser,
        schedule,
        table,
        conditions,
        shape,
        images=images,
        batch=batch,
        seed=seed,
        guidance=guidance,
        device=device,
        progress=progress,
    )
    return recorder.recordings


def observe_trajectories(
    recorder: Recorder,
    denoiser: nn.Module,
    schedule: NoiseSchedule,
    table: TimestepTable,
    conditions: Conditions,
    shape: tuple[int, ...],
    *,
    images: int,
    batch: int,
    seed: int,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Let a recorder observe the layers' inputs along the float model's trajectories.

    Args:
        recorder: recorder, which sees every call under its step and batch.
        denoiser: the float model; it is not changed.
        schedule: schedule of the trajectories.
        table: the calibrated timesteps, equal to those of the schedule.
        conditions: conditions of all images.
        shape: shape (C, H, W) of one sample.
        images: number of trajectories.
        batch: number of trajectories per denoiser call.
        seed: seed of the initial noise.
        guidance: classifier-free guidance scale of the trajectories.
        device: device of the denoiser.
        progress: callback with the completed and the total number of steps.
    """
    batches = -(-images // batch)
    if not recorder.layers:
        return
    modules = {name: denoiser.get_submodule(name) for name in recorder.layers}

    def at_step(**inputs: Any) -> Any:
        recorder.step = int(table.index(inputs["timestep"])[0])
        return denoiser(**inputs)

    with input_hooks(modules, recorder.observe):
        for recorder.batch in range(batches):
            first = recorder.batch * batch
            count = min(batch, images - first)
            noise = seeded_noise(shape, seed, first, count, "calibration").to(device)
            part = conditions.take(slice(first, first + count)).to(device)
            for point in walk(at_step, schedule.to(device), noise, part, guidance):
                if progress is not None:
                    done = recorder.batch * len(schedule) + point.position + 1
                    progress(done, batches * len(schedule))
