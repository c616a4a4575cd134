"""The noise schedule, and one DDIM step that takes a timestep per batch item.

diffusers' schedulers move a whole batch by one step. Fine-tuning lets every item of a batch stand at
its own step, so it needs the update as a plain function. Letters: B images, C, H, W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.prediction import PREDICTIONS, clean_and_noise
from trtq.errors import UsageError

__all__ = ["NoiseSchedule", "inference_timesteps", "set_timesteps"]

_LEAST_SIGNAL = 1e-3


def set_timesteps(scheduler: Any, steps: int, tokens: int | None) -> Any:
    """A fresh scheduler of this kind with its steps set, as diffusers' own pipelines set them.

    Args:
        scheduler: it is not changed.
        steps: number of denoising steps.
        tokens: see `inference_timesteps`.

    Raises:
        UsageError: the number of steps is out of range, alone or with the scheduler's offset.
    """
    trained = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= trained:
        raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
    fresh = type(scheduler).from_config(scheduler.config)
    if not scheduler.config.get("use_dynamic_shifting", False):
        fresh.set_timesteps(steps)
        noisiest = fresh.timesteps.max()
        if hasattr(fresh, "alphas_cumprod") and noisiest >= trained:
            raise UsageError(
                f"steps={steps} is out of range: {type(fresh).__name__} would go to timestep "
                f"{noisiest:g}, and the model knows 0 .. {trained - 1}; choose fewer"
            )
        return fresh
    if tokens is None:
        raise UsageError(
            f"the timesteps of {type(scheduler).__name__} with use_dynamic_shifting depend on the image "
            "size, which this model does not tell"
        )
    # The shift grows linearly with the number of image tokens (diffusers' `calculate_shift`).
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    shift = least + (most - least) * (tokens - few) / (many - few)
    # In double precision, as the pipelines do.
    sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
    fresh.set_timesteps(sigmas=sigmas, mu=shift)
    return fresh


def inference_timesteps(scheduler: Any, steps: int, tokens: int | None = None) -> list[float]:
    """The timesteps that this scheduler visits in `steps` steps, noisiest first.

    Args:
        scheduler: a diffusers scheduler; it is not changed.
        steps: number of denoising steps.
        tokens: image tokens of a transformer, on which some schedulers depend.

    Raises:
        UsageError: the number of steps is out of range.
    """
    # Second-order solvers list a timestep twice, once per evaluation.
    timesteps = set_timesteps(scheduler, steps, tokens).timesteps.tolist()
    return list(dict.fromkeys(float(t) for t in timesteps))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """`x_t = signal_t x_0 + sigma_t noise`, and its deterministic or noisy reverse.

    For diffusion `signal^2 + sigma^2 = 1`; for flow matching `signal + sigma = 1`.

    Attributes:
        timesteps: those visited, noisiest first, as the denoiser is told them; float32[T].
        signal: share of the clean sample at each position, and behind the last one; float32[T + 1].
        sigma: that of the noise, likewise.
        prediction: what the denoiser predicts, one of `PREDICTIONS`.
        clip: bound of the predicted clean sample, or None.
    """

    timesteps: Tensor
    signal: Tensor
    sigma: Tensor
    prediction: str
    clip: float | None

    @classmethod
    def of(
        cls, scheduler: Any, steps: int, *, tokens: int | None = None, timestep_scale: float = 1.0
    ) -> NoiseSchedule:
        """Read it off a diffusers scheduler.

        Args:
            scheduler: it is not changed.
            steps: number of denoising steps.
            tokens: see `inference_timesteps`.
            timestep_scale: what a pipeline multiplies timesteps by before the denoiser sees them.

        Raises:
            UsageError: the scheduler's noise levels are not known, or its prediction type is not.
        """
        timesteps = torch.tensor(inference_timesteps(scheduler, steps, tokens))
        config = scheduler.config
        alphas = getattr(scheduler, "alphas_cumprod", None)
        flow = alphas is None or config.get("use_flow_sigmas", False)
        prediction = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
        if prediction not in PREDICTIONS or (alphas is None and not hasattr(scheduler, "sigmas")):
            raise UsageError(
                f"cannot follow the trajectory of {type(scheduler).__name__} with prediction type "
                f"{prediction!r}; needed are cumulative alphas or sigmas, and one of "
                f"{', '.join(PREDICTIONS)}"
            )
        if flow:
            sigma = timesteps / float(config.num_train_timesteps)
            signal = 1 - sigma
        else:
            alpha = _interpolate(torch.as_tensor(alphas).float(), timesteps)
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        clip = None
        if config.get("clip_sample", False):
            clip = float(config.get("clip_sample_range", 1.0))
        end = torch.ones(1), torch.zeros(1)
        return cls(
            (timesteps * timestep_scale).float(),
            torch.cat([signal, end[0]]),
            torch.cat([sigma, end[1]]),
            prediction,
            clip,
        )

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The schedule with its tensors on a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            signal=self.signal.to(device),
            sigma=self.sigma.to(device),
        )

    def influence(self) -> Tensor:
        """How much a squared error of the prediction at each position weighs in the final sample.

        With `u = x_t / signal_t` and `n = sigma_t / signal_t` a deterministic step is
        `u' = u + (n' - n) noise`, so an error `e` of the predicted noise moves `u'` by `(n' - n) e`.
        What is left of it at the end is what the probability flow leaves of any displacement: for
        normally distributed data of unit variance `sqrt(1 / (1 + n'^2))` of it. Weighing by this is
        our own; with uniform weights the last step, whose noise is hardest to tell and matters least,
        makes up most of the loss.

        Returns:
            float32[T], `(n - n')^2 / (1 + n'^2)` times what a squared error of this kind of
            prediction is in terms of noise, scaled to a mean of 1.
        """
        signal, sigma = self.signal.double(), self.sigma.double()
        # A flow starts at pure noise, where `n` is infinite; all that follows are ratios of it.
        level = sigma / signal.clamp_min(_LEAST_SIGNAL)
        here, after = level[:-1], level[1:]
        weight = (here - after).square() / (1 + after.square())
        if self.prediction == "sample":
            weight = weight / here.square()
        elif self.prediction != "epsilon":
            # An error e of the velocity, or of the flow, is one of `signal e` of the noise.
            weight = weight * signal[:-1].clamp_min(_LEAST_SIGNAL).square()
        return (weight / weight.mean()).float()

    def _parts(self, x: Tensor, predicted: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that a prediction means, at positions `at[B, 1, ...]`."""
        signal, sigma = self.signal[at].to(x), self.sigma[at].to(x)
        clean, noise = clean_and_noise(self.prediction, x, predicted, signal, sigma)
        return clean, noise

    def step(
        self,
        x: Tensor,
        predicted: Tensor,
        position: Tensor,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One DDIM step (arXiv 2010.02502, eq. 12), each batch item at its own position.

        For a flow it is the Euler step, and `eta` must be 0.

        Args:
            x: `x_t`, `[B,C,H,W]`.
            predicted: the denoiser's output at `x`, same shape.
            position: LongTensor[B], place of each item along the trajectory, 0 = noisiest.
            eta: 0 deterministic, 1 as noisy as DDPM.
            noise: standard normal, shaped like `x`; needed when `eta > 0`.

        Returns:
            The sample at the next timestep, `[B,C,H,W]`.
        """
        at = position.reshape(-1, *(1,) * (x.ndim - 1))
        clean, epsilon = self._parts(x, predicted, at)
        if self.clip is not None:
            # The direction follows the model's own noise even where the clean sample was clipped, as
            # diffusers' DDIM does unless told otherwise.
            clean = clean.clamp(-self.clip, self.clip)
        signal_next, sigma_next = self.signal[at + 1].to(x), self.sigma[at + 1].to(x)
        if not eta:
            return signal_next * clean + sigma_next * epsilon
        if self.prediction == "flow_prediction":
            raise UsageError("noise between the steps (eta > 0) is not defined for flow matching")
        signal, sigma = self.signal[at].to(x), self.sigma[at].to(x)
        added = eta * (sigma_next / sigma) * (1 - (signal / signal_next).square()).sqrt()
        direction = (sigma_next.square() - added.square()).clamp_min(0).sqrt()
        stepped = signal_next * clean + direction * epsilon
        return stepped if noise is None else stepped + added * noise


def _interpolate(table: Tensor, timesteps: Tensor) -> Tensor:
    """`table[t]`, linearly between its entries for timesteps that are not whole."""
    low = timesteps.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp_max(len(table) - 1)
    return torch.lerp(table[low], table[high], (timesteps - low).float())
