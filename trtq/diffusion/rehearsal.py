"""A pipeline's own call without denoising: what the pipeline passes to its denoiser and scheduler.

The pipeline runs as a copy, in which a stand-in replaces the denoiser and the autoencoder's decoder, so
neither computes anything.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trtq.checkpoint.components import AUTOENCODERS, denoiser_class
from trtq.checkpoint.wording import one_line
from trtq.diffusion.families import family_named
from trtq.diffusion.scheduler_rules import SCHEDULER_ERRORS, quiet_scheduler
from trtq.errors import ArtefactError, TrtqError

__all__ = ["Rehearsal", "rehearse"]

_STEPS = 2
# Both forms of a result in diffusers: `result[0]` and `result.sample`.
_Output = namedtuple("_Output", "sample")
_Stepped = namedtuple("_Stepped", "prev_sample pred_original_sample")


class _EndOfCallError(BaseException):
    """Ends a pipeline's call."""


class _StandIn:
    """A component with some attributes replaced; `call` replaces its call.

    Args:
        part: the component.
        replaced: attributes by name.
    """

    def __init__(self, part: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _part=part)

    @property  # type: ignore[misc]  # Nothing assigns the class of a stand-in.
    def __class__(self) -> Any:
        """Class of the component, which pipelines check."""
        return vars(self)["_part"].__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_part"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["call"](*args, **kwargs)


@dataclass
class Rehearsal:
    """What a pipeline passed on during its call.

    Attributes:
        sample: noisy input of the first denoiser call, `[R, ...]`; R rows: the images, or twice as many.
        inputs: other inputs of the first denoiser call, by flat name.
        timesteps: timestep of each denoiser call.
        scheduler: the pipeline's scheduler after the pipeline set its timesteps; None before.
        noise: first sample that the pipeline passed to its scheduler.
        following: last sample that the scheduler returned.
        decoded: what the pipeline passed to its autoencoder's decoder; None: it has none.
        encoder_calls: keyword arguments of each text encoder's first call, by name.
        failure: the exception that ended the call; None: there was none.
        refusal: the reason why the pipeline cannot use its scheduler; None: it can.
    """

    sample: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[str, Tensor] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    scheduler: Any = None
    noise: Tensor | None = None
    following: Tensor | None = None
    decoded: Tensor | None = None
    encoder_calls: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failure: Exception | None = None
    refusal: str | None = None

    @property
    def timestep_scale(self) -> float:
        """Factor between the scheduler's timesteps and the denoiser's."""
        listed = float(self.scheduler.timesteps[0])
        return round(self.timesteps[0] / listed, 6) if self.timesteps and listed else 1.0


class _Rehearsed:
    """The stand-ins of one rehearsal, which fill in its results."""

    def __init__(self, denoiser: Any, calls: int | None) -> None:
        self.seen = Rehearsal()
        self._denoiser = denoiser
        self._calls = calls

    def denoise(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Take a denoiser's arguments; the prediction is zero."""
        model_class: Any = denoiser_class(self._denoiser)
        family = family_named(model_class.__name__)
        names = list(inspect.signature(model_class.forward).parameters)[1:]
        flat = family.flatten(dict(zip(names, args, strict=False)) | kwargs)
        sample, timestep = flat.pop(family.sample), flat.pop("timestep")
        if not self.seen.timesteps:
            self.seen.sample, self.seen.inputs = sample, flat
        self.seen.timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        if self._calls is not None and len(self.seen.timesteps) >= self._calls:
            raise _EndOfCallError
        config = self._denoiser.config
        if sample.ndim < 4:
            return _Output(torch.zeros_like(sample))
        channels = config.get("out_channels") or config.get("in_channels") or sample.shape[1]
        shape = (len(sample), int(channels), *sample.shape[2:])
        return _Output(torch.zeros(shape, dtype=sample.dtype, device=sample.device))

    def decode(self, latents: Tensor, *_: Any, **__: Any) -> Any:
        """Take the latents that are decoded, and end the call."""
        self.seen.decoded = latents
        raise _EndOfCallError

    def parts(self, pipeline: Any, name: str, encoders: Sequence[str]) -> dict[str, Any]:
        """Stand-ins by name of the component."""
        others = {k: v for k, v in vars(pipeline).items() if isinstance(v, nn.Module) and k != name}
        # A denoiser may lie on another device than everything else, or have no memory.
        places = (value.device for other in others.values() for value in other.parameters())
        place = next(places, torch.device("cpu"))
        parts = {name: _StandIn(self._denoiser, call=self.denoise, device=place)}
        for part in (*AUTOENCODERS, *encoders):
            component = getattr(pipeline, part, None)
            if component is not None and part in AUTOENCODERS:
                parts[part] = _StandIn(component, decode=self.decode)
            elif component is not None:
                parts[part] = self.observed(part, component)
        return parts

    def prepared(self, scheduler: Any) -> Any:
        """A copy of a scheduler that notes its timesteps and its samples."""
        fresh = type(scheduler).from_config(scheduler.config)
        set_timesteps, step = fresh.set_timesteps, fresh.step

        @functools.wraps(set_timesteps)
        def spy_set(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            kept = {k: v for k, v in vars(fresh).items() if k not in ("set_timesteps", "step")}
            self.seen.scheduler = type(fresh).from_config(fresh.config)
            vars(self.seen.scheduler).update(copy.deepcopy(kept))

        @functools.wraps(step)
        def spy_step(prediction: Tensor, timestep: Any, sample: Tensor, *a: Any, **kw: Any) -> Any:
            if self.seen.noise is None:
                self.seen.noise = sample
            result = step(prediction, timestep, sample, *a, **kw)
            self.seen.following = result[0]
            return result

        fresh.set_timesteps, fresh.step = spy_set, spy_step
        return fresh

    def neutral(self, scheduler: Any) -> Any:
        """A scheduler that takes any settings and changes nothing."""

        def step(prediction: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
            self.seen.noise = self.seen.following = sample
            return _Stepped(sample, sample)

        return _StandIn(
            scheduler,
            order=1,
            init_noise_sigma=1.0,
            timesteps=torch.arange(_STEPS, 0, -1),
            # Pipelines inspect the names of the arguments.
            set_timesteps=lambda num_inference_steps=None, device=None, sigmas=None, mu=None: None,
            set_begin_index=lambda index: None,
            scale_model_input=lambda sample, timestep=None: sample,
            step=step,
        )

    def observed(self, name: str, encoder: Any) -> Any:
        """A text encoder that notes the arguments of its first call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.encoder_calls.setdefault(name, kwargs)
            return encoder(*args, **kwargs)

        return _StandIn(encoder, call=call)


@torch.no_grad()
def rehearse(
    pipeline: Any,
    name: str,
    arguments: Mapping[str, Any],
    *,
    calls: int | None = None,
    steps: int | None = None,
    encoders: Sequence[str] = (),
    encode_prompt: Callable[..., Any] | None = None,
) -> Rehearsal:
    """Run a pipeline's call without denoising, up to its autoencoder's decoder.

    Args:
        pipeline: diffusers pipeline; it is not changed.
        name: name of the denoiser.
        arguments: arguments of the call; those that the pipeline does not take are left out.
        calls: number of denoiser calls after which the call ends; None: all.
        steps: number of denoising steps of the pipeline's own scheduler, whose exceptions are part of
            the result; None: a scheduler that changes nothing.
        encoders: text encoders whose calls are noted.
        encode_prompt: replacement for the pipeline's method of this name.

    Raises:
        ArtefactError: the pipeline cannot be called, for another reason than its scheduler.
    """
    denoiser = getattr(pipeline, name)
    rehearsed = _Rehearsed(denoiser, calls)
    parts = rehearsed.parts(pipeline, name, encoders)
    if encode_prompt is not None:
        parts["encode_prompt"] = encode_prompt
    prepared = rehearsed.neutral if steps is None else rehearsed.prepared
    copied = copy.copy(pipeline)
    copied.set_progress_bar_config(disable=True)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    offered = {
        "num_inference_steps": _STEPS if steps is None else steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
        "use_resolution_binning": False,
        **arguments,
    }
    try:
        with quiet_scheduler(), torch.random.fork_rng(devices=[]):
            vars(copied).update(parts, scheduler=prepared(pipeline.scheduler))
            copied(**{key: value for key, value in offered.items() if key in accepted})
    except _EndOfCallError:
        pass
    except TrtqError:
        raise
    except SCHEDULER_ERRORS as err:
        if steps is None:
            raise ArtefactError(
                f"{type(pipeline).__name__} cannot be called: {type(err).__name__}: {one_line(err)}"
            ) from err
        rehearsed.seen.failure = err.with_traceback(None)
    return rehearsed.seen
