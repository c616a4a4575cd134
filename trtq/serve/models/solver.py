"""Solvers: the trajectory of one image from noise to the clean sample.

DDIM, which the shipped models and many class-conditional models use, is implemented with numpy. It
needs neither torch nor diffusers, whose imports take five times as long as the rest of a server's
startup. All other schedulers come from diffusers, with one copy per image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from trtq.diffusion.prediction import clean_and_noise
from trtq.errors import UsageError
from trtq.serve.models.samples import Samples

__all__ = ["Ddim", "DdimSolver", "SchedulerSolver", "Solver"]


class Solver(Protocol):
    """The trajectory of one image, from noise to the clean sample.

    Attributes:
        timesteps: timestep of each denoiser call, noisiest first.
        initial_scale: standard deviation of the initial noise.
    """

    timesteps: Sequence[float]
    initial_scale: float

    def scaled(self, x: Samples, position: int) -> Samples:
        """Scale a sample `[1, ...]` to the denoiser's input at a position.

        Args:
            x: current sample, `[1, ...]`.
            position: number of completed denoiser calls.
        """

    def step(self, x: Samples, predicted: Samples, position: int) -> tuple[Samples, Samples]:
        """The sample at the next position, and the clean sample that the prediction implies.

        Args:
            x: current sample, `[1, ...]`.
            predicted: the denoiser's prediction, `[1, ...]`.
            position: number of completed denoiser calls.

        Returns:
            Next sample and clean sample, `[1, ...]` each.
        """


class Ddim:
    """The noise levels of diffusers' `DDIMScheduler`, read from its configuration.

    Args:
        config: content of `scheduler_config.json`.

    Raises:
        UsageError: the configuration belongs to another scheduler, or has settings that only diffusers
            implements.
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
        """Whether this is DDIM with settings that `DdimSolver` implements."""
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
        """The timesteps of a trajectory, int64[steps], noisiest first.

        Args:
            steps: number of denoising steps.

        Raises:
            UsageError: the number of steps is out of range.
        """
        trained = self.trained
        if not 1 <= steps <= trained:
            raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
        if self.spacing == "leading":
            timesteps = np.arange(steps)[::-1] * (trained // steps) + self.offset
        elif self.spacing == "trailing":
            # For some step counts, rounding errors add a timestep after the last one.
            spaced = np.arange(trained, 0, -trained / steps)[:steps]
            timesteps = np.round(spaced).astype(np.int64) - 1
        else:
            timesteps = np.linspace(0, trained - 1, steps).round()[::-1].astype(np.int64)
        if timesteps[0] >= trained:
            raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained - self.offset}")
        return timesteps

    def solver(self, steps: int) -> DdimSolver:
        """The solver for this number of steps; it has no state, so all images share it.

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
    """The deterministic denoising steps of DDIM (arXiv 2010.02502, eq. 12).

    Args:
        timesteps: int64[T], noisiest first.
        alpha: cumulative product of alphas at each timestep, float32[T].
        alpha_next: cumulative product of alphas at the following timestep, float32[T].
        prediction: quantity that the denoiser predicts, see `trtq.diffusion.prediction`.
        clip: bound of the absolute value of the predicted clean sample; None: no bound.
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
        # 0-d arrays: with Python floats or numpy scalars a step takes 1.5 times as long.
        levels = zip(
            np.sqrt(alpha),
            np.sqrt(1 - alpha),
            np.sqrt(alpha_next),
            np.sqrt(1 - alpha_next),
            strict=True,
        )
        self._levels = [tuple(np.array(value) for value in values) for values in levels]
        # Torch multiplies by a number of Python in the tensor's own type.
        self._scalars = [tuple(float(value) for value in values) for values in self._levels]
        self._prediction = prediction
        self._bounds = (
            None if clip is None else (np.array(-clip, np.float32), np.array(clip, np.float32))
        )

    def scaled(self, x: Samples, position: int) -> Samples:
        """The sample itself: the denoisers of DDIM do not scale their input."""
        return x

    def step(self, x: Samples, predicted: Samples, position: int) -> tuple[Samples, Samples]:
        """The sample at the next position, and the clean sample that the prediction implies."""
        of_host = isinstance(x, np.ndarray)
        levels: Any = self._levels[position] if of_host else self._scalars[position]
        signal, sigma, signal_next, sigma_next = levels
        clean, noise = clean_and_noise(self._prediction, x, predicted, signal, sigma)
        if self._bounds is not None and not of_host:
            clean = clean.clamp(*map(float, self._bounds))
        elif self._bounds is not None:
            clean = np.minimum(np.maximum(clean, self._bounds[0]), self._bounds[1])
        return signal_next * clean + sigma_next * noise, clean


class SchedulerSolver:
    """The denoising steps of a scheduler from diffusers, which may keep state between steps.

    Args:
        scheduler: a copy of the scheduler for this image, with its timesteps set.
        generator: random generator of the noise that some schedulers add at each step.
        timestep_scale: factor by which the pipeline multiplies the denoiser's timesteps.
    """

    def __init__(self, scheduler: Any, generator: Any = None, timestep_scale: float = 1.0) -> None:
        self._scheduler = scheduler
        parameters = inspect.signature(scheduler.step).parameters
        self._extra = {"generator": generator} if "generator" in parameters else {}
        self._scheduler_timesteps = list(scheduler.timesteps)
        self.timesteps: Sequence[float] = [
            float(t) * timestep_scale for t in self._scheduler_timesteps
        ]
        self.initial_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))

    def scaled(self, x: Samples, position: int) -> Samples:
        """Scale a sample `[1, ...]` to the denoiser's input at a position."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return x
        scaled = self._scheduler.scale_model_input(_tensor(x), self._scheduler_timesteps[position])
        return scaled.numpy() if isinstance(x, np.ndarray) else scaled

    def step(self, x: Samples, predicted: Samples, position: int) -> tuple[Samples, Samples]:
        """The next sample and the clean sample, which may be the same array."""
        timestep = self._scheduler_timesteps[position]
        output = self._scheduler.step(_tensor(predicted), timestep, _tensor(x), **self._extra)
        clean = getattr(output, "pred_original_sample", None)
        following = output.prev_sample
        both = following, following if clean is None else clean
        return (both[0].numpy(), both[1].numpy()) if isinstance(x, np.ndarray) else both


def _tensor(x: Samples) -> Any:
    import torch

    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
