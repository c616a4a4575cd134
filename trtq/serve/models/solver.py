"""Stepping one image along its trajectory: what each request has of its own.

DDIM, which the shipped models and most class-conditional ones use, is spelled out on numpy: it needs
neither torch nor diffusers, whose imports take five times as long as everything else that a server does
before it is ready. All other schedulers are diffusers' own, a copy per image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from trtq.diffusion.prediction import clean_and_noise
from trtq.errors import UsageError

__all__ = ["Ddim", "DdimSolver", "SchedulerSolver", "Solver"]


class Solver(Protocol):
    """The trajectory of one image, from noise to the clean sample.

    Attributes:
        timesteps: what the denoiser is told at each call, noisiest first.
        initial_scale: what standard normal noise is multiplied by to start.
    """

    timesteps: Sequence[float]
    initial_scale: float

    def scaled(self, x: np.ndarray, position: int) -> np.ndarray:
        """The denoiser's input at a position, `[1, ...]`."""

    def step(
        self, x: np.ndarray, predicted: np.ndarray, position: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sample at the next position and the clean sample that this prediction means."""


class Ddim:
    """The noise levels of a `DDIMScheduler` of diffusers, read from its configuration.

    Args:
        config: what `scheduler_config.json` holds.

    Raises:
        UsageError: it is another scheduler, or one with settings that only diffusers knows.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not self.knows(config):
            raise UsageError(f"the scheduler {config.get('_class_name')!r} needs diffusers")
        self.trained = int(config.get("num_train_timesteps", 1000))
        self.prediction = str(config.get("prediction_type", "epsilon"))
        self.spacing = str(config.get("timestep_spacing", "leading"))
        self.offset = int(config.get("steps_offset", 0))
        clip = config.get("clip_sample", True)
        self.clip = float(config.get("clip_sample_range", 1.0)) if clip else None
        self.alphas = np.cumprod(1 - _betas(config, self.trained), dtype=np.float32)
        self.last_alpha = 1.0 if config.get("set_alpha_to_one", True) else float(self.alphas[0])
        self._solvers: dict[int, DdimSolver] = {}

    @staticmethod
    def knows(config: Mapping[str, Any]) -> bool:
        """Whether this is DDIM with settings that are spelled out here."""
        return (
            config.get("_class_name") == "DDIMScheduler"
            and config.get("beta_schedule", "linear") in ("linear", "scaled_linear")
            and config.get("trained_betas") is None
            and config.get("prediction_type", "epsilon") in ("epsilon", "sample", "v_prediction")
            and config.get("timestep_spacing", "leading") in ("leading", "trailing", "linspace")
            and not config.get("thresholding", False)
            and not config.get("rescale_betas_zero_snr", False)
        )

    def timesteps(self, steps: int) -> np.ndarray:
        """Those visited in a number of steps, int64[steps], noisiest first.

        Raises:
            UsageError: the number of steps is out of range.
        """
        most = self.trained
        if not 1 <= steps <= most:
            raise UsageError(f"steps={steps} is out of range; choose 1 .. {most}")
        if self.spacing == "leading":
            found = np.arange(steps)[::-1] * (most // steps) + self.offset
        elif self.spacing == "trailing":
            # Rounding errors of some step counts give one more, beyond the last.
            found = np.round(np.arange(most, 0, -most / steps)[:steps]).astype(np.int64) - 1
        else:
            found = np.linspace(0, most - 1, steps).round()[::-1].astype(np.int64)
        if found[0] >= most:
            raise UsageError(f"steps={steps} is out of range; choose 1 .. {most - self.offset}")
        return found

    def solver(self, steps: int) -> DdimSolver:
        """The trajectory of so many steps; it keeps no state, so images share it.

        Raises:
            UsageError: the number of steps is out of range.
        """
        if steps not in self._solvers:
            self._solvers[steps] = self._make(steps)
        return self._solvers[steps]

    def _make(self, steps: int) -> DdimSolver:
        timesteps = self.timesteps(steps)
        before = timesteps - self.trained // steps
        alpha = self.alphas[timesteps]
        alpha_next = np.where(before >= 0, self.alphas[before.clip(0)], np.float32(self.last_alpha))
        return DdimSolver(timesteps, alpha, alpha_next, self.prediction, self.clip)


def _betas(config: Mapping[str, Any], count: int) -> np.ndarray:
    first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if config.get("beta_schedule", "linear") == "linear":
        return np.linspace(first, last, count, dtype=np.float32)
    return np.linspace(first**0.5, last**0.5, count, dtype=np.float32) ** 2


class DdimSolver:
    """One image's deterministic DDIM steps (arXiv 2010.02502, eq. 12).

    Args:
        timesteps: int64[T], noisiest first.
        alpha: cumulative alpha at each, float32[T].
        alpha_next: that of the next one, float32[T].
        prediction: what the denoiser predicts, see `trtq.diffusion.prediction`.
        clip: bound of the predicted clean sample, or None.
    """

    initial_scale = 1.0

    def __init__(
        self,
        timesteps: np.ndarray,
        alpha: np.ndarray,
        alpha_next: np.ndarray,
        prediction: str,
        clip: float | None,
    ) -> None:
        self.timesteps: Sequence[float] = [float(t) for t in timesteps]
        # As arrays without axes: numbers, Python's or numpy's own, take half as long again.
        levels = zip(
            np.sqrt(alpha),
            np.sqrt(1 - alpha),
            np.sqrt(alpha_next),
            np.sqrt(1 - alpha_next),
            strict=True,
        )
        self._levels = [tuple(np.array(level) for level in one) for one in levels]
        self._prediction = prediction
        self._bounds = (
            None if clip is None else (np.array(-clip, np.float32), np.array(clip, np.float32))
        )

    def scaled(self, x: np.ndarray, position: int) -> np.ndarray:
        """DDIM's denoisers take the sample as it is."""
        return x

    def step(
        self, x: np.ndarray, predicted: np.ndarray, position: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sample at the next position and the clean sample that this prediction means."""
        signal, sigma, signal_next, sigma_next = self._levels[position]
        clean, noise = clean_and_noise(self._prediction, x, predicted, signal, sigma)
        if self._bounds is not None:
            clean = np.minimum(np.maximum(clean, self._bounds[0]), self._bounds[1])
        return signal_next * clean + sigma_next * noise, clean


class SchedulerSolver:
    """One image's steps by a scheduler of diffusers, which may keep a state.

    Args:
        scheduler: a copy of its own, its timesteps set.
        generator: of the noise that some schedulers add at each step.
        timestep_scale: what the pipeline multiplies timesteps by before the denoiser sees them.
    """

    def __init__(self, scheduler: Any, generator: Any = None, timestep_scale: float = 1.0) -> None:
        self._scheduler = scheduler
        takes = inspect.signature(scheduler.step).parameters
        self._extra = {"generator": generator} if "generator" in takes else {}
        self._own = list(scheduler.timesteps)
        self.timesteps: Sequence[float] = [float(t) * timestep_scale for t in self._own]
        self.initial_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))

    def scaled(self, x: np.ndarray, position: int) -> np.ndarray:
        """The denoiser's input at a position, `[1, ...]`."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return x
        import torch

        scaled = self._scheduler.scale_model_input(torch.from_numpy(x), self._own[position])
        array: np.ndarray = scaled.numpy()
        return array

    def step(
        self, x: np.ndarray, predicted: np.ndarray, position: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sample at the next position and the clean one; the next again where it is not told."""
        import torch

        sample, prediction = torch.from_numpy(x), torch.from_numpy(predicted)
        moved = self._scheduler.step(prediction, self._own[position], sample, **self._extra)
        clean = getattr(moved, "pred_original_sample", None)
        after: np.ndarray = moved.prev_sample.numpy()
        return after, after if clean is None else clean.numpy()
