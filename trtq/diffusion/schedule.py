"""The noise schedule, and one DDIM step that takes a timestep per batch item.

diffusers' schedulers move a whole batch by one step. Fine-tuning lets every item of a batch stand at
its own step, so it needs the update as a plain function. Letters: B images, C, H, W.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.prediction import PREDICTIONS, clean_and_noise
from trtq.diffusion.quiet import quiet_diffusers
from trtq.errors import UsageError

__all__ = [
    "KNOWN_PIPELINES",
    "KNOWN_SCHEDULERS",
    "NoiseSchedule",
    "Stepping",
    "check_steps",
    "inference_timesteps",
    "set_timesteps",
    "stepping_of",
]

_MIN_SIGNAL = 1e-3

# Per class, whether `sigmas[i]` is the noise level at `timesteps[i]`. Where it is not, the level is read
# off the cumulative alphas.
_ALPHAS = {
    "DDIMParallelScheduler": False,
    "DDIMScheduler": False,
    "DDPMParallelScheduler": False,
    "DDPMScheduler": False,
    "DEISMultistepScheduler": True,
    "DPMSolverMultistepScheduler": True,
    "DPMSolverSDEScheduler": False,
    "DPMSolverSinglestepScheduler": True,
    "EulerAncestralDiscreteScheduler": True,
    "EulerDiscreteScheduler": True,
    "HeunDiscreteScheduler": True,
    "KDPM2AncestralDiscreteScheduler": False,
    "KDPM2DiscreteScheduler": False,
    "LCMScheduler": False,
    "LMSDiscreteScheduler": True,
    "PNDMScheduler": False,
    "TCDScheduler": False,
    "UniPCMultistepScheduler": True,
}
_FLOW = {
    "FlowMatchEulerDiscreteScheduler": True,
    "FlowMatchHeunDiscreteScheduler": True,
    "FlowMatchLCMScheduler": True,
}
KNOWN_SCHEDULERS = tuple(sorted(_ALPHAS | _FLOW))
"""Those of diffusers whose timesteps and noise levels are known in closed form."""
_CLIPS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
)
_WHAT_SCHEDULERS_RAISE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
_REHEARSED: dict[tuple[Any, ...], str | None] = {}
_MAX_REHEARSED = 4096


@dataclass(frozen=True)
class Stepping:
    """What a pipeline of diffusers does with its scheduler.

    Attributes:
        scales_noise: it multiplies its first noise by `init_noise_sigma`.
        scales_input: it passes every input of the denoiser through `scale_model_input`.
        lenient: it does both only where the scheduler has such a thing.
        generator: it passes `step` a generator, whether the scheduler takes one or not.
        eta: it passes `step` an `eta`, whether the scheduler takes one or not.
        linear_sigmas: it passes noise levels of its own, evenly spaced from 1 to 1 / steps, unless the
            scheduler has `use_flow_sigmas`.
        shift: when it passes `mu`, the shift by image size: `never`, where the scheduler has
            `use_dynamic_shifting` (`dynamic`), or `always`.
        max_shift: the largest shift where the scheduler names none.
        second_of_one: of a single step it takes the second result, which not every scheduler has.
    """

    scales_noise: bool = True
    scales_input: bool = True
    lenient: bool = False
    generator: bool = False
    eta: bool = False
    linear_sigmas: bool = False
    shift: str = "never"
    max_shift: float = 1.15
    second_of_one: bool = False


_BARE = Stepping(scales_noise=False, scales_input=False)
_STEPPING = {
    "ClassConditionalPipeline": Stepping(lenient=True),
    "DDIMPipeline": replace(_BARE, generator=True, eta=True),
    "DDPMPipeline": replace(_BARE, generator=True),
    "DiTPipeline": Stepping(scales_noise=False),
    "FluxPipeline": replace(_BARE, linear_sigmas=True, shift="always"),
    "LDMPipeline": Stepping(),
    "LDMTextToImagePipeline": _BARE,
    "PixArtAlphaPipeline": Stepping(second_of_one=True),
    "PixArtSigmaPipeline": Stepping(),
    "StableDiffusion3Pipeline": replace(_BARE, shift="dynamic", max_shift=1.16),
    "StableDiffusionPipeline": Stepping(),
    "StableDiffusionXLPipeline": Stepping(),
}
KNOWN_PIPELINES = tuple(sorted(set(_STEPPING) - {"ClassConditionalPipeline"}))
"""Pipelines of diffusers of which it is known what they do with their scheduler."""
_ANY = Stepping(linear_sigmas=True, shift="dynamic")


def stepping_of(pipeline: Any) -> Stepping | None:
    """What this pipeline does with its scheduler; None for one that is not known.

    What counts is the class that brings the call: a subclass that draws in another way is not known.
    """
    for cls in type(pipeline).__mro__:
        if "__call__" in vars(cls):
            return _STEPPING.get(cls.__name__)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers says of its own code and of outdated settings."""
    with quiet_diffusers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _refused(
    scheduler: Any, reason: str, stepping: Stepping | None = None, advice: str | None = None
) -> UsageError:
    """An error that names the scheduler and says what to do: by default what to put in its place."""
    if advice is None:
        flow = _name(scheduler) in _FLOW if stepping is None else stepping.shift != "never"
        other = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        if other == _name(scheduler):
            advice = f"change its settings, or use the defaults of {other}()"
        else:
            advice = (
                f"use another one, e.g. pipe.scheduler = {other}.from_config(pipe.scheduler.config)"
            )
    return UsageError(f"the scheduler {_name(scheduler)} {reason}; {advice}")


def _own_settings(scheduler: Any) -> dict[str, Any]:
    """The settings that this class has.

    One made of another scheduler's configuration keeps that one's settings in its own, unused.
    """
    known = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in known}


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines() or [""]
    return f"{type(err).__name__}: {lines[0][:200]}"


def _trained(scheduler: Any) -> int:
    return int(scheduler.config.get("num_train_timesteps", 1000))


def _fresh(scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None) -> Any:
    """`set_timesteps`, before anything is checked that diffusers itself does not check."""
    trained = _trained(scheduler)
    if not 1 <= steps <= trained:
        raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
    config = scheduler.config
    chosen = _ANY if stepping is None else stepping
    dynamic = bool(config.get("use_dynamic_shifting", False))
    arguments: dict[str, Any] = {}
    linear = chosen.linear_sigmas and not config.get("use_flow_sigmas", False)
    if linear and (stepping is not None or dynamic):
        # In double precision, as the pipelines do.
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        arguments["sigmas"] = sigmas
    else:
        arguments["num_inference_steps"] = steps
    if chosen.shift == "always" or (chosen.shift == "dynamic" and dynamic):
        if tokens is None:
            raise UsageError(
                f"the timesteps of {_name(scheduler)} with use_dynamic_shifting depend on the image "
                "size, which is not known for this model"
            )
        arguments["mu"] = _shift(config, tokens, chosen.max_shift)
    try:
        with _quiet():
            fresh = type(scheduler).from_config(config)
            fresh.set_timesteps(**arguments)
    except _WHAT_SCHEDULERS_RAISE as err:
        reason = f"gives no timesteps for steps={steps} ({_first_line(err)})"
        raise _refused(scheduler, reason, stepping) from err
    return fresh


def _shift(config: Any, tokens: int, max_shift: float) -> float:
    """As diffusers' `calculate_shift`, it grows linearly with the number of image tokens."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (most - least) / (many - few)
    return float(tokens * slope + (least - slope * few))


def set_timesteps(
    scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None = None
) -> Any:
    """A fresh scheduler of this kind with its steps set, as diffusers' own pipelines set them.

    Args:
        scheduler: it is not changed.
        steps: number of denoising steps.
        tokens: see `inference_timesteps`.
        stepping: what the pipeline passes; None: noise levels and shift of Flux where the scheduler
            depends on the image size, nothing elsewhere.

    Raises:
        UsageError: the number of steps is out of range, alone or with the scheduler's offset, or the
            scheduler does not take these settings.
    """
    fresh = _fresh(scheduler, steps, tokens, stepping)
    timesteps = torch.as_tensor(fresh.timesteps).double()
    if not len(timesteps) or not bool(torch.isfinite(timesteps).all()):
        reason = f"gives timesteps for steps={steps} that are not finite numbers"
        raise _refused(scheduler, reason, stepping)
    trained, noisiest = _trained(scheduler), float(timesteps.max())
    if hasattr(fresh, "alphas_cumprod") and (noisiest >= trained or float(timesteps.min()) < 0):
        wrong = noisiest if noisiest >= trained else float(timesteps.min())
        raise UsageError(
            f"steps={steps} is out of range: {_name(scheduler)} would go to timestep "
            f"{wrong:g}, and the model knows 0 .. {trained - 1}; choose fewer"
        )
    return fresh


def check_steps(
    scheduler: Any,
    steps: int,
    tokens: int | None = None,
    stepping: Stepping | None = None,
    channels: int = 3,
) -> None:
    """Nothing, if a pipeline can walk this scheduler's steps from the first to the last.

    The scheduler is walked on a sample of a few zeros, so what breaks inside diffusers, breaks before
    any work is done. Results are kept: a walk costs a millisecond per step.

    Args:
        scheduler: it is not changed.
        steps: number of denoising steps.
        tokens: see `inference_timesteps`.
        stepping: what the pipeline does with it, see `set_timesteps`.
        channels: of one sample; some solvers take the first three for the image.

    Raises:
        UsageError: the number of steps is out of range, or the scheduler breaks on these settings.
    """
    chosen = Stepping() if stepping is None else stepping
    config = json.dumps(dict(scheduler.config), sort_keys=True, default=_plain)
    key = (type(scheduler), config, steps, tokens, stepping, channels)
    if key not in _REHEARSED:
        fresh = set_timesteps(scheduler, steps, tokens, stepping)
        if len(_REHEARSED) >= _MAX_REHEARSED:
            _REHEARSED.clear()
        _REHEARSED[key] = _rehearse(fresh, chosen, channels)
    broken = _REHEARSED[key]
    if broken is not None:
        reason = f"fails at steps={steps} with these settings: {broken}"
        raise _refused(scheduler, reason, stepping)


def _plain(value: Any) -> Any:
    """A setting that JSON has no form for."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def _rehearse(scheduler: Any, stepping: Stepping, channels: int) -> str | None:
    """What goes wrong when a pipeline steps this scheduler, or None. The scheduler is used up."""
    initial = getattr(scheduler, "init_noise_sigma", None)
    if initial is None and stepping.scales_noise and not stepping.lenient:
        return "the pipeline reads its init_noise_sigma, which it does not have"
    if not stepping.scales_noise and initial is not None and abs(float(initial) - 1) > 1e-3:
        return "it requires scaled initial noise, which the pipeline does not pass"
    if (
        not hasattr(scheduler, "scale_model_input")
        and stepping.scales_input
        and not stepping.lenient
    ):
        return "the pipeline calls its scale_model_input, which it does not have"
    x = torch.zeros(1, channels, 2, 2)
    learned = str(_own_settings(scheduler).get("variance_type", "")).startswith("learned")
    predicted = torch.cat([x, x], 1) if learned and stepping.generator else x
    takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if stepping.generator or "generator" in takes:
        extra["generator"] = torch.Generator().manual_seed(0)
    if stepping.eta or "eta" in takes:
        extra["eta"] = 0.0
    try:
        with _quiet():
            if hasattr(scheduler, "scale_model_input"):
                ones = torch.ones(1, 1, 1, 1)
                scaled = scheduler.scale_model_input(ones, scheduler.timesteps[0])
                if not stepping.scales_input and not torch.allclose(scaled, ones, atol=1e-3):
                    return "it requires scaled denoiser inputs, which the pipeline does not pass"
            for t in scheduler.timesteps:
                if stepping.scales_input and hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                found = scheduler.step(predicted, t, x, **extra, return_dict=False)
                if stepping.second_of_one and len(scheduler.timesteps) == len(found) == 1:
                    return "of one step the pipeline takes a second result, which it does not give"
                x = found[0]
    except _WHAT_SCHEDULERS_RAISE as err:
        return f"diffusers itself breaks ({_first_line(err)})"
    if not bool(torch.isfinite(x).all()):
        return "its samples become NaN or infinite"
    return None


def inference_timesteps(
    scheduler: Any, steps: int, tokens: int | None = None, stepping: Stepping | None = None
) -> list[float]:
    """The timesteps that this scheduler visits in `steps` steps, each once, noisiest first.

    Args:
        scheduler: a diffusers scheduler; it is not changed.
        steps: number of denoising steps.
        tokens: image tokens of a transformer, on which some schedulers depend.
        stepping: what the pipeline passes, see `set_timesteps`.

    Raises:
        UsageError: the number of steps is out of range, or the scheduler is not known.
    """
    return _visited(scheduler, steps, tokens, stepping)[0].tolist()


def _visited(
    scheduler: Any, steps: int, tokens: int | None, stepping: Stepping | None
) -> tuple[Tensor, Tensor | None]:
    """Timesteps, float32[T], noisiest first; the scheduler's own sigma of each where it tells."""
    _check_known(scheduler, stepping)
    fresh = set_timesteps(scheduler, steps, tokens, stepping)
    listed = torch.as_tensor(fresh.timesteps).float()
    if float(listed[0]) != float(listed.max()):
        raise _refused(scheduler, "does not begin at its noisiest timestep", stepping)
    aligned = (_ALPHAS | _FLOW)[_name(scheduler)]
    # Second-order solvers list a timestep twice, once per evaluation, or go back to one; steps that are
    # close together may share one.
    first: dict[float, int] = {}
    for position, timestep in enumerate(listed.tolist()):
        first.setdefault(timestep, position)
    timesteps = sorted(first, reverse=True)
    sigmas = None
    if aligned:
        every = torch.as_tensor(fresh.sigmas).float().cpu()
        sigmas = every[torch.tensor([first[t] for t in timesteps])]
    return torch.tensor(timesteps), sigmas


def _check_known(scheduler: Any, stepping: Stepping | None) -> None:
    """Nothing, if timesteps and noise levels of this scheduler are known.

    Raises:
        UsageError: they are not; the message says what is allowed.
    """
    import diffusers

    name = _name(scheduler)
    if name not in KNOWN_SCHEDULERS or type(scheduler) is not getattr(diffusers, name, None):
        known = ", ".join(one.removesuffix("Scheduler") for one in KNOWN_SCHEDULERS)
        reason = f"is not one whose timesteps and noise levels are known; known are {known}"
        raise _refused(scheduler, reason, stepping)
    own = _own_settings(scheduler)
    kind = own.get("timestep_type", "discrete")
    if kind != "discrete":
        reason = f"has timestep_type={kind!r}; known is 'discrete'"
        raise _refused(scheduler, reason, stepping)
    if own.get("invert_sigmas", False):
        reason = "has invert_sigmas=True, which goes from clean to noisy; known is False"
        raise _refused(scheduler, reason, stepping)


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
        threshold: share of its values and largest bound of dynamic thresholding, or None.
    """

    timesteps: Tensor
    signal: Tensor
    sigma: Tensor
    prediction: str
    clip: float | None
    threshold: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        scheduler: Any,
        steps: int,
        *,
        tokens: int | None = None,
        timestep_scale: float = 1.0,
        stepping: Stepping | None = None,
        channels: int = 3,
    ) -> NoiseSchedule:
        """Read it off a diffusers scheduler.

        Args:
            scheduler: it is not changed.
            steps: number of denoising steps.
            tokens: see `inference_timesteps`.
            timestep_scale: what a pipeline multiplies timesteps by before the denoiser sees them.
            stepping: what the pipeline passes, see `set_timesteps`.
            channels: see `check_steps`.

        Raises:
            UsageError: the scheduler's noise levels are not known, or its prediction type is not.
        """
        timesteps, sigmas = _visited(scheduler, steps, tokens, stepping)
        own = _own_settings(scheduler)
        flow = _name(scheduler) in _FLOW or bool(own.get("use_flow_sigmas", False))
        prediction = own.get("prediction_type", "flow_prediction" if flow else "epsilon")
        known = [
            one for one in PREDICTIONS if one != ("v_prediction" if flow else "flow_prediction")
        ]
        if prediction not in known:
            raise _refused(
                scheduler,
                f"has prediction_type={prediction!r}; supported with its noise levels are "
                f"{', '.join(known)}",
                advice="set the one that the model was trained with",
            )
        if flow:
            trained = float(_trained(scheduler))
            sigma = timesteps / trained if sigmas is None else sigmas
            signal = 1 - sigma
        elif sigmas is not None:
            signal = 1 / (1 + sigmas.double().square()).sqrt()
            sigma = (sigmas * signal).float()
            signal = signal.float()
        else:
            alpha = _interpolate(torch.as_tensor(scheduler.alphas_cumprod).float(), timesteps)
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        _check_levels(scheduler, signal, sigma, prediction)
        check_steps(scheduler, steps, tokens, stepping, channels)
        clips = _name(scheduler) in _CLIPS and own.get("clip_sample", False)
        end = torch.ones(1), torch.zeros(1)
        return cls(
            (timesteps.double() * timestep_scale).float(),
            torch.cat([signal, end[0]]),
            torch.cat([sigma, end[1]]),
            prediction,
            float(own.get("clip_sample_range", 1.0)) if clips else None,
            _threshold(own),
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
        level = sigma / signal.clamp_min(_MIN_SIGNAL)
        here, after = level[:-1], level[1:]
        weight = (here - after).square() / (1 + after.square())
        if self.prediction == "sample":
            weight = weight / here.square()
        elif self.prediction != "epsilon":
            # An error e of the velocity, or of the flow, is one of `signal e` of the noise.
            weight = weight * signal[:-1].clamp_min(_MIN_SIGNAL).square()
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
        if self.threshold is not None:
            clean = _thresholded(clean, *self.threshold)
        elif self.clip is not None:
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


def _check_levels(scheduler: Any, signal: Tensor, sigma: Tensor, prediction: str) -> None:
    """Nothing, if these are shares of clean sample and noise along a trajectory.

    Raises:
        UsageError: they are negative, not finite or not falling.
    """
    level = sigma.double() / signal.double()
    fine = bool(torch.isfinite(signal).all() and torch.isfinite(sigma).all())
    fine = fine and float(signal.min()) >= 0 and float(sigma.min()) > 0
    if not fine or bool((level.diff() >= 0).any()):
        shown = [f"{value:.4g}" for value in level.tolist()]
        ends = shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-3:]]
        reason = (
            "has noise levels that are negative, not finite or not falling with these settings "
            f"({', '.join(ends)})"
        )
        advice = "set others, such as the betas that the model was trained with"
        raise _refused(scheduler, reason, advice=advice)
    if prediction == "epsilon" and not math.isfinite(float(level[0])):
        raise _refused(
            scheduler,
            "begins at pure noise, where prediction_type='epsilon' tells nothing about the image",
            advice="set rescale_betas_zero_snr=False, or the prediction_type of the model's training",
        )


def _threshold(own: dict[str, Any]) -> tuple[float, float] | None:
    """Settings of dynamic thresholding; of solvers in terms of noise only those of clean samples."""
    if not own.get("thresholding", False):
        return None
    if str(own.get("algorithm_type", "dpmsolver++")) in ("dpmsolver", "sde-dpmsolver"):
        return None
    return float(own["dynamic_thresholding_ratio"]), float(own["sample_max_value"])


def _thresholded(clean: Tensor, ratio: float, most: float) -> Tensor:
    """Clean samples `[B, ...]` within the quantile of their own values (arXiv 2205.11487)."""
    values = clean.flatten(1)
    bound = torch.quantile(values.float().abs(), ratio, dim=1, keepdim=True).to(clean)
    bound = bound.clamp(1, most)
    return (values.clamp(-bound, bound) / bound).reshape(clean.shape)


def _interpolate(table: Tensor, timesteps: Tensor) -> Tensor:
    """`table[t]`, linearly between its entries for timesteps that are not whole."""
    low = timesteps.floor().long().clamp(0, len(table) - 1)
    high = (low + 1).clamp_max(len(table) - 1)
    return torch.lerp(table[low], table[high], (timesteps - low).float())
