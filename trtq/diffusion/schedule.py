"""The noise schedule, and one DDIM step that takes a timestep per batch item.

diffusers' schedulers move a whole batch by one step. Fine-tuning lets every item of a batch stand at
its own step, so it needs the update as a plain function. Letters: B images, C, H, W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.errors import UsageError

__all__ = ["NoiseSchedule", "inference_timesteps"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def inference_timesteps(scheduler: Any, steps: int) -> list[float]:
    """The timesteps that this scheduler visits in `steps` steps, noisiest first.

    Raises:
        UsageError: the number of steps is out of range.
    """
    trained = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= trained:
        raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    seen: list[float] = []
    for t in fresh.timesteps.tolist():
        # Second-order solvers list a timestep twice, once per evaluation.
        if t not in seen:
            seen.append(t)
    return seen


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """`x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`, and its deterministic or noisy reverse.

    Attributes:
        alphas_cumprod: `abar`, float32 `[num_train_timesteps]`.
        timesteps: those visited, noisiest first, as in `inference_timesteps`.
        prediction: what the denoiser predicts: `epsilon`, `v_prediction` or `sample`.
        clip: bound of the predicted clean sample, or None.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor
    prediction: str
    clip: float | None

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> NoiseSchedule:
        """Read it off a diffusers scheduler.

        Raises:
            UsageError: the scheduler has no cumulative alphas or an unknown prediction type.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if alphas is None or prediction not in PREDICTIONS:
            raise UsageError(
                f"cannot follow the trajectory of {type(scheduler).__name__} with prediction type "
                f"{prediction!r}; needed are cumulative alphas and one of {', '.join(PREDICTIONS)}"
            )
        clip = None
        if scheduler.config.get("clip_sample", False):
            clip = float(scheduler.config.get("clip_sample_range", 1.0))
        return cls(
            alphas.float(),
            torch.tensor(inference_timesteps(scheduler, steps), dtype=torch.float32),
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
            alphas_cumprod=self.alphas_cumprod.to(device),
            timesteps=self.timesteps.to(device),
        )

    def _alpha(self, position: Tensor) -> Tensor:
        """`abar` at a position along the trajectory; 1 behind its end."""
        t = torch.cat([self.timesteps, self.timesteps.new_tensor([-1.0])])[position].long()
        return torch.where(t >= 0, self.alphas_cumprod[t.clamp_min(0)], 1.0)

    def influence(self) -> Tensor:
        """How much a squared error of the prediction at each position weighs in the final sample.

        With `u = x_t / sqrt(abar_t)` and `n = sqrt((1 - abar_t) / abar_t)` a DDIM step is
        `u' = u + (n' - n) noise`, so an error `e` of the predicted noise moves `u'` by `(n' - n) e`.
        What is left of it at the end is what the probability flow leaves of any displacement: for
        normally distributed data of unit variance `sqrt(1 / (1 + n'^2))` of it. Weighing by this is
        our own; with uniform weights the last step, whose noise is hardest to tell and matters least,
        makes up most of the loss.

        Returns:
            float32[T], `(n - n')^2 / (1 + n'^2)` times what a squared error of this kind of
            prediction is in terms of noise, scaled to a mean of 1.
        """
        alpha = self._alpha(torch.arange(len(self) + 1, device=self.timesteps.device)).double()
        level = ((1 - alpha) / alpha).sqrt()
        here, after = level[:-1], level[1:]
        weight = (here - after).square() / (1 + after.square())
        if self.prediction == "v_prediction":
            weight = weight * alpha[:-1]
        elif self.prediction == "sample":
            weight = weight / here.square()
        return (weight / weight.mean()).float()

    def step(
        self,
        x: Tensor,
        predicted: Tensor,
        position: Tensor,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One DDIM step (arXiv 2010.02502, eq. 12), each batch item at its own position.

        Args:
            x: `x_t`, `[B,C,H,W]`.
            predicted: the denoiser's output at `x`, same shape.
            position: LongTensor[B], place of each item along the trajectory, 0 = noisiest.
            eta: 0 deterministic, 1 as noisy as DDPM.
            noise: standard normal, shaped like `x`; needed when `eta > 0`.

        Returns:
            The sample at the next timestep, `[B,C,H,W]`.
        """
        shape = (-1, *(1,) * (x.ndim - 1))
        alpha = self._alpha(position).reshape(shape).to(x)
        alpha_next = self._alpha(position + 1).reshape(shape).to(x)
        sigma_t = (1 - alpha).sqrt()
        if self.prediction == "epsilon":
            clean = (x - sigma_t * predicted) / alpha.sqrt()
        elif self.prediction == "v_prediction":
            clean = alpha.sqrt() * x - sigma_t * predicted
        else:
            clean = predicted
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        # The direction follows the model's own noise even where the clean sample was clipped, as
        # diffusers' DDIM does unless told otherwise.
        epsilon = predicted
        if self.prediction == "v_prediction":
            epsilon = alpha.sqrt() * predicted + sigma_t * x
        elif self.prediction == "sample":
            epsilon = (x - alpha.sqrt() * predicted) / sigma_t
        sigma = eta * ((1 - alpha_next) / (1 - alpha)).sqrt() * (1 - alpha / alpha_next).sqrt()
        stepped = (
            alpha_next.sqrt() * clean + (1 - alpha_next - sigma**2).clamp_min(0).sqrt() * epsilon
        )
        return stepped if noise is None else stepped + sigma * noise
