"""Noise schedule and DDIM step with a timestep per batch item.

diffusers' schedulers advance a whole batch by one step. In fine-tuning, each item of a batch is at its
own step, so the update is a pure function here. Letters: B images; C, H, W channels, height and width;
T steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.prediction import PREDICTIONS, clean_and_noise
from trtq.diffusion.scheduler_rules import (
    CLIPPING_SCHEDULERS,
    FLOW_SCHEDULERS,
    check_known,
    scheduler_name,
    scheduler_refusal,
    trained_steps,
    used_settings,
)
from trtq.diffusion.timesteps import set_timesteps, visited_timesteps
from trtq.errors import UsageError

__all__ = ["NoiseSchedule"]

_MIN_SIGNAL = 1e-3


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """`x_t = signal_t x_0 + sigma_t noise`, and its deterministic or stochastic reverse.

    For diffusion `signal^2 + sigma^2 = 1`; for flow matching `signal + sigma = 1`.

    Attributes:
        timesteps: visited timesteps in the denoiser's units, noisiest first; float32[T].
        signal: factor of the clean sample at each position and after the last one; float32[T + 1].
        sigma: factor of the noise at each position and after the last one; float32[T + 1].
        prediction: quantity that the denoiser predicts, one of `PREDICTIONS`.
        clip: bound of the absolute value of the predicted clean sample; None: no bound.
        threshold: quantile and maximum bound of dynamic thresholding; None: no thresholding.
    """

    timesteps: Tensor
    signal: Tensor
    sigma: Tensor
    prediction: str
    clip: float | None
    threshold: tuple[float, float] | None = None

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> NoiseSchedule:
        """The schedule of a diffusers scheduler whose timesteps depend on their number alone.

        Args:
            scheduler: scheduler of diffusers; it is not changed.
            steps: number of denoising steps.

        Raises:
            UsageError: see `of_stepped`, or the number of steps is out of range.
        """
        check_known(scheduler)
        return cls.of_stepped(set_timesteps(scheduler, steps))

    @classmethod
    def of_stepped(cls, scheduler: Any, timestep_scale: float = 1.0) -> NoiseSchedule:
        """The schedule of a diffusers scheduler whose timesteps are set.

        Args:
            scheduler: known scheduler of diffusers; it is not changed.
            timestep_scale: factor between the scheduler's timesteps and the denoiser's.

        Raises:
            UsageError: the scheduler's noise levels or its prediction type are not supported.
        """
        timesteps, sigmas = visited_timesteps(scheduler)
        settings = used_settings(scheduler)
        flow = scheduler_name(scheduler) in FLOW_SCHEDULERS or bool(
            settings.get("use_flow_sigmas", False)
        )
        prediction = _prediction(scheduler, settings, flow=flow)
        signal, sigma = _levels(scheduler, timesteps, sigmas, flow=flow)
        _check_levels(scheduler, signal, sigma, prediction)
        clips = scheduler_name(scheduler) in CLIPPING_SCHEDULERS
        clips = clips and settings.get("clip_sample", False)
        return cls(
            (timesteps.double() * timestep_scale).float(),
            torch.cat([signal, torch.ones(1)]),
            torch.cat([sigma, torch.zeros(1)]),
            prediction,
            float(settings.get("clip_sample_range", 1.0)) if clips else None,
            _threshold(settings),
        )

    def __len__(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tensors on `device`."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            signal=self.signal.to(device),
            sigma=self.sigma.to(device),
        )

    def influence(self) -> Tensor:
        """Weight of a squared prediction error at each position in the final sample.

        With `u = x_t / signal_t` and `n = sigma_t / signal_t`, a deterministic step is
        `u' = u + (n' - n) noise`, so an error `e` of the predicted noise moves `u'` by `(n' - n) e`.
        The probability flow shrinks this displacement until the end: for normally distributed data of
        unit variance, the factor is `sqrt(1 / (1 + n'^2))`. The weighting is not from a paper. With
        uniform weights, the last step dominates the loss, although its noise is the hardest to
        predict and has the smallest effect.

        Returns:
            float32[T], `(n - n')^2 / (1 + n'^2)` times the squared noise error per squared error of this
            kind of prediction, scaled to a mean of 1.
        """
        signal, sigma = self.signal.double(), self.sigma.double()
        # A flow starts at pure noise, where `n` is infinite; the formulas below use only ratios of `n`.
        level = sigma / signal.clamp_min(_MIN_SIGNAL)
        here, after = level[:-1], level[1:]
        weight = (here - after).square() / (1 + after.square())
        if self.prediction == "sample":
            weight = weight / here.square()
        elif self.prediction != "epsilon":
            # An error e of the velocity or of the flow equals a noise error of `signal e`.
            weight = weight * signal[:-1].clamp_min(_MIN_SIGNAL).square()
        return (weight / weight.mean()).float()

    def _parts(self, x: Tensor, predicted: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Clean sample and noise implied by a prediction, at positions `at[B, 1, ...]`."""
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
        """One DDIM step (arXiv 2010.02502, eq. 12), with a separate position per batch item.

        A flow takes an Euler step; `eta` must be 0.

        Args:
            x: noisy sample `x_t`, `[B,C,H,W]`.
            predicted: denoiser output at `x`, `[B,C,H,W]`.
            position: LongTensor[B], position of each item in the trajectory, 0 = noisiest.
            eta: amount of fresh noise: 0 is deterministic, 1 is as noisy as DDPM.
            noise: standard normal noise, `[B,C,H,W]`; required if `eta > 0`.

        Returns:
            The sample at the next timestep, `[B,C,H,W]`.

        Raises:
            UsageError: `eta > 0` for a flow.
        """
        at = position.reshape(-1, *(1,) * (x.ndim - 1))
        clean, epsilon = self._parts(x, predicted, at)
        if self.threshold is not None:
            clean = _thresholded(clean, *self.threshold)
        elif self.clip is not None:
            # The direction follows the predicted noise even if the clean sample was clipped, as by
            # default in diffusers' DDIM.
            clean = clean.clamp(-self.clip, self.clip)
        signal_next, sigma_next = self.signal[at + 1].to(x), self.sigma[at + 1].to(x)
        if not eta:
            return signal_next * clean + sigma_next * epsilon
        if self.prediction == "flow_prediction":
            raise UsageError("eta > 0 is not defined for flow matching; use eta=0")
        signal, sigma = self.signal[at].to(x), self.sigma[at].to(x)
        added = eta * (sigma_next / sigma) * (1 - (signal / signal_next).square()).sqrt()
        direction = (sigma_next.square() - added.square()).clamp_min(0).sqrt()
        stepped = signal_next * clean + direction * epsilon
        return stepped if noise is None else stepped + added * noise


def _prediction(scheduler: Any, settings: dict[str, Any], *, flow: bool) -> str:
    """The quantity that the denoiser predicts, by the scheduler's settings.

    Raises:
        UsageError: the scheduler's noise levels do not support it.
    """
    prediction = settings.get("prediction_type", "flow_prediction" if flow else "epsilon")
    other_kind = "v_prediction" if flow else "flow_prediction"
    supported = [kind for kind in PREDICTIONS if kind != other_kind]
    if prediction not in supported:
        raise scheduler_refusal(
            scheduler,
            f"has prediction_type={prediction!r}; supported with its noise levels are "
            f"{', '.join(supported)}",
            advice="set the prediction_type of the model's training",
        )
    return str(prediction)


def _levels(
    scheduler: Any, timesteps: Tensor, sigmas: Tensor | None, *, flow: bool
) -> tuple[Tensor, Tensor]:
    """Factors of the clean sample and the noise at `timesteps[T]`, float32[T] each."""
    if flow:
        trained = float(trained_steps(scheduler))
        sigma = timesteps / trained if sigmas is None else sigmas
        return 1 - sigma, sigma
    if sigmas is not None:
        signal = 1 / (1 + sigmas.double().square()).sqrt()
        return signal.float(), (sigmas * signal).float()
    alpha = _interpolate(torch.as_tensor(scheduler.alphas_cumprod).float(), timesteps)
    return alpha.sqrt(), (1 - alpha).sqrt()


def _check_levels(scheduler: Any, signal: Tensor, sigma: Tensor, prediction: str) -> None:
    """Raise unless the factors of clean sample and noise, float32[T] each, form a trajectory.

    Raises:
        UsageError: a factor is negative or not finite, or the noise level does not decrease.
    """
    level = sigma.double() / signal.double()
    fine = bool(torch.isfinite(signal).all() and torch.isfinite(sigma).all())
    fine = fine and float(signal.min()) >= 0 and float(sigma.min()) > 0
    if not fine or bool((level.diff() >= 0).any()):
        shown = [f"{value:.4g}" for value in level.tolist()]
        ends = shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-3:]]
        reason = (
            "has noise levels that are negative, not finite or not decreasing with these settings "
            f"({', '.join(ends)})"
        )
        advice = "change the settings, e.g. to the betas of the model's training"
        raise scheduler_refusal(scheduler, reason, advice=advice)
    if prediction == "epsilon" and not math.isfinite(float(level[0])):
        raise scheduler_refusal(
            scheduler,
            "starts at pure noise, where prediction_type='epsilon' carries no information about the "
            "image",
            advice="set rescale_betas_zero_snr=False, or the prediction_type of the model's training",
        )


def _threshold(settings: dict[str, Any]) -> tuple[float, float] | None:
    """Quantile and maximum bound of dynamic thresholding; None if off or ignored."""
    if not settings.get("thresholding", False):
        return None
    # These solvers integrate the noise and do not clip the clean sample.
    if str(settings.get("algorithm_type", "dpmsolver++")) in ("dpmsolver", "sde-dpmsolver"):
        return None
    return float(settings["dynamic_thresholding_ratio"]), float(settings["sample_max_value"])


def _thresholded(clean: Tensor, ratio: float, max_bound: float) -> Tensor:
    """Clean samples `[B, ...]`, clipped at a quantile of their values (arXiv 2205.11487)."""
    values = clean.flatten(1)
    bound = torch.quantile(values.float().abs(), ratio, dim=1, keepdim=True).to(clean)
    bound = bound.clamp(1, max_bound)
    return (values.clamp(-bound, bound) / bound).reshape(clean.shape)


def _interpolate(table: Tensor, timesteps: Tensor) -> Tensor:
    """`table[t]`, linearly interpolated at fractional timesteps."""
    low = timesteps.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp_max(len(table) - 1)
    return torch.lerp(table[low], table[high], (timesteps - low).float())
