"""A pipeline's own call as the source of its denoiser's inputs and of its use of its scheduler.

trtq describes no pipeline: rehearsals of its own call say what it passes on. Letters: P prompts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trtq.checkpoint.components import denoiser_class
from trtq.diffusion.encode import Encoded, embedded_guidance, takes_negative
from trtq.diffusion.rehearsal import Rehearsal, rehearse
from trtq.diffusion.scheduler_rules import first_line, scheduler_refusal, trained_steps
from trtq.diffusion.timesteps import checked_timesteps
from trtq.errors import UsageError

__all__ = ["OwnCall"]

_GUIDANCE = 2.0
"""Any guidance scale with which pipelines also compute a prediction without the prompt."""
_ENCODE_BATCH = 64
_MAX_REHEARSALS = 256
_TOLERANCE = 1e-3
Size = tuple[int, int]


class OwnCall:
    """The call of a pipeline, rehearsed on demand.

    Args:
        pipeline: diffusers pipeline; its scheduler may be replaced later.
        denoiser_name: component that predicts the noise.
    """

    def __init__(self, pipeline: Any, denoiser_name: str) -> None:
        self._pipeline = pipeline
        self._name = denoiser_name
        # Rows of the denoiser's inputs for one image, and names of the inputs with a batch axis.
        self._rows, self._batched = 0, [""]
        self._texts: list[Any] = []
        self._rehearsals: dict[tuple[Any, ...], Rehearsal] = {}

    @property
    def wants_flow(self) -> bool:
        """Whether the pipeline is written for a scheduler of flow matching."""
        parameter = inspect.signature(type(self._pipeline).__init__).parameters.get("scheduler")
        return parameter is not None and "FlowMatch" in str(parameter.annotation)

    def first(self, size: Size) -> Rehearsal:
        """The call for one image of an empty prompt or class 0, with a scheduler that changes nothing.

        Args:
            size: height and width in pixels.

        Raises:
            ArtefactError: the pipeline cannot be called.
        """
        call = self._rehearse(self._arguments([""], size), encode_prompt=self._encoding_once())
        self._rows = len(call.sample)
        self._batched = [k for k, value in call.inputs.items() if value.shape[:1] == (self._rows,)]
        return call

    def encode(self, prompts: list[str], size: Size, negative: str | None = None) -> Encoded:
        """Encode prompts as the pipeline itself does.

        Args:
            prompts: P prompts, at least one.
            size: height and width in pixels.
            negative: negative prompt of all images; None: the pipeline's encoding of no prompt, which
                for Stable Diffusion XL differs from the encoding of an empty prompt.

        Returns:
            The encodings, tensors on the CPU.

        Raises:
            ArtefactError: the pipeline cannot be called.
            UsageError: the pipeline takes no negative prompt.
        """
        if not self._rows:
            self.first(size)
        parts = [
            self._encoded(prompts[first : first + _ENCODE_BATCH], size, negative)
            for first in range(0, len(prompts), _ENCODE_BATCH)
        ]
        model_class: Any = denoiser_class(getattr(self._pipeline, self._name))
        order = list(inspect.signature(model_class.forward).parameters)
        # The order of a graph's inputs.
        names = sorted(
            self._batched, key=lambda name: order.index(name) if name in order else len(order)
        )
        conditional = {
            name: torch.cat([part[name].chunk(self._rows)[-1] for part in parts]) for name in names
        }
        unconditional = None
        if self._rows > 1:
            unconditional = {name: parts[0][name][:1].clone() for name in names}
        shared = {name: value for name, value in parts[0].items() if name not in names}
        return Encoded(conditional, unconditional, shared)

    def _encoded(self, prompts: list[str], size: Size, negative: str | None) -> dict[str, Tensor]:
        """Inputs of the first denoiser call: those without a prompt first, if there are such."""
        arguments = self._arguments(prompts, size)
        if takes_negative(self._pipeline, self._name):
            if negative is not None:
                arguments["negative_prompt"] = [negative] * len(prompts)
        elif negative:
            kind = type(self._pipeline).__name__
            raise UsageError(f"{kind} takes no negative prompt; leave it out")
        call = self._rehearse(arguments, calls=1)
        return {name: value.cpu() for name, value in call.inputs.items()}

    def encoder_calls(self, names: Sequence[str], size: Size) -> Mapping[str, Mapping[str, Any]]:
        """Keyword arguments of the first call of each text encoder, by name; see `Rehearsal`."""
        return self._rehearse(self._arguments([""], size), calls=1, encoders=names).encoder_calls

    def scheduled(self, steps: int, size: Size) -> Rehearsal:
        """The call with the pipeline's own scheduler, whose timesteps are valid.

        Args:
            steps: number of denoising steps.
            size: height and width in pixels.

        Raises:
            UsageError: the number of steps is out of range, or the scheduler gives no timesteps.
            ArtefactError: the pipeline cannot be called with any scheduler.
        """
        scheduler = self._pipeline.scheduler
        trained = trained_steps(scheduler)
        if not 1 <= steps <= trained:
            raise UsageError(f"steps={steps} is out of range; choose 1 .. {trained}")
        settings = sorted(scheduler.config.items())
        config = repr([(k, v.tolist() if hasattr(v, "tolist") else v) for k, v in settings])
        key = (type(scheduler), config, steps, size)
        if key not in self._rehearsals:
            first, arguments = self.first(size), self._arguments([""], size, guided=False)
            if len(self._rehearsals) >= _MAX_REHEARSALS:
                self._rehearsals.clear()
            call = self._rehearse(arguments, steps=steps, encode_prompt=self._encoding_once())
            call.refusal = _refusal(first, call)
            # The tensors are large.
            self._rehearsals[key] = replace(
                call, sample=call.sample[:0], inputs={}, noise=None, following=None, decoded=None
            )
        call = self._rehearsals[key]
        if call.scheduler is None:
            reason = "sets no timesteps" if call.failure is None else first_line(call.failure)
            reason = f"gives no timesteps for steps={steps} ({reason})"
            raise scheduler_refusal(scheduler, reason, flow=self.wants_flow)
        checked_timesteps(call.scheduler, steps, flow=self.wants_flow)
        return call

    def check(self, steps: int, size: Size) -> None:
        """Raise unless the pipeline can run its scheduler from the first to the last step.

        Raises:
            UsageError: see `scheduled`; or the scheduler fails with its settings or in this pipeline.
        """
        refusal = self.scheduled(steps, size).refusal
        if refusal is not None:
            reason = f"fails at steps={steps} with these settings: {refusal}"
            raise scheduler_refusal(self._pipeline.scheduler, reason, flow=self.wants_flow)

    def _arguments(self, prompts: list[str], size: Size, *, guided: bool = True) -> dict[str, Any]:
        pipeline = self._pipeline
        arguments: dict[str, Any] = {"height": size[0], "width": size[1], "guidance_scale": 1.0}
        if "prompt" in inspect.signature(type(pipeline).__call__).parameters:
            embedded = embedded_guidance(pipeline, self._name)
            if embedded is not None or guided:
                arguments["guidance_scale"] = _GUIDANCE if embedded is None else embedded
            return arguments | {"prompt": prompts}
        return arguments | {"class_labels": [0], "batch_size": 1}

    def _rehearse(self, arguments: dict[str, Any], **options: Any) -> Rehearsal:
        return rehearse(self._pipeline, self._name, arguments, **options)

    def _encoding_once(self) -> Callable[..., Any] | None:
        """The pipeline's `encode_prompt` for an empty prompt, which computes only once."""
        encode = getattr(self._pipeline, "encode_prompt", None)
        if encode is None:
            return None

        def once(*args: Any, **kwargs: Any) -> Any:
            if not self._texts:
                self._texts.append(encode(*args, **kwargs))
            return self._texts[0]

        return once


def _refusal(first: Rehearsal, call: Rehearsal) -> str | None:
    """The reason why a pipeline cannot use its scheduler; None if there is none."""
    if call.failure is not None:
        return f"diffusers raises an error ({first_line(call.failure)})"
    scheduler, noise = call.scheduler, call.noise
    if scheduler is None or noise is None or first.noise is None or call.following is None:
        return "the pipeline does not use it"
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if not _close(noise, first.noise * scale):
        return "it requires scaled initial noise, which the pipeline does not pass"
    if hasattr(scheduler, "scale_model_input"):
        scaled = copy.deepcopy(scheduler).scale_model_input(noise, scheduler.timesteps[0])
        if not _close(call.sample, scaled):
            return "it requires scaled denoiser inputs, which the pipeline does not pass"
    if not bool(torch.isfinite(call.following).all()):
        return "its samples become NaN or infinite"
    return None


def _close(passed: Tensor, expected: Tensor) -> bool:
    return passed.shape == expected.shape and torch.allclose(
        passed.float(), expected.float(), rtol=_TOLERANCE, atol=_TOLERANCE
    )
