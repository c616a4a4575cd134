"""Measurements of a pipeline that is used through its own call."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trtq.artefact.opened import Checkpoint, open_artefact
from trtq.bench.measured import DENOISER, Measured, TimedCall
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.calls.user_call import COUNT_ARGUMENTS, UserCall, accepted_arguments, run_call
from trtq.checkpoint.components import denoiser_class, denoisers_of
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.pipelines.called import CallOptions, call_for, steps_of
from trtq.pipelines.generate_called import called_media
from trtq.pipelines.open import TORCH, open_any
from trtq.progress import silent

__all__ = ["MeasuredCall"]

_GUIDANCE = "guidance_scale"


class MeasuredCall(Measured):
    """An artefact whose pipeline is called as it is.

    Args:
        call_of: artefact whose recorded call is made; empty: a default call.
    """

    def __init__(self, call_of: str) -> None:
        super().__init__()
        self._call_of = call_of

    def open(self, path: str, provider: str, threads: int, size: str | None) -> dict[str, Any]:
        """Load the artefact.

        Args:
            path: artefact or checkpoint, see `trtq.pipelines.open.open_any`.
            provider: runtime, see `trtq.pipelines.open.open_any`.
            threads: number of threads per operator.
            size: image size; not used, since the call has a size.

        Returns:
            The values of `Measured`; `model_class`: classes of the denoisers; an empty `shape`; `parts`
            to time; `guidance` and `steps` of the call; no `prompts`, since the call has its own.

        Raises:
            TrtqError: the artefact cannot be opened.
        """
        loaded = self._load(path, provider, threads, lambda: _opened(path, provider, threads))
        recorded = load_call(Path(self._call_of) / CALL_FOLDER) if self._call_of else None
        self._user_call = call_for(self.source, recorded, CallOptions())
        classes = [denoiser_class(module) for module in self._denoisers.values()]
        return loaded | {
            "shape": [],
            "model_class": ", ".join(cls.__name__ for cls in classes),
            "parts": [DENOISER],
            "guidance": self._guidance,
            "steps": steps_of(self.source.pipeline, self._user_call),
            "prompts": None,
        }

    @property
    def _denoisers(self) -> dict[str, nn.Module]:
        return denoisers_of(self.source.pipeline)

    @property
    def _guidance(self) -> float:
        """Guidance scale of the call; 1 if the call has none."""
        parameter = accepted_arguments(self.source.pipeline).get(_GUIDANCE)
        default = None if parameter is None else parameter.default
        value = self._user_call.arguments.get(_GUIDANCE, default)
        return float(value) if isinstance(value, int | float) else 1.0

    def _called_with(self, batch: int, steps: int, guidance: float) -> UserCall:
        """The user's call with another number of images, of steps, or another guidance scale.

        Raises:
            UsageError: the pipeline's call has no argument for one of them.
        """
        pipeline, call = self.source.pipeline, self._user_call
        accepted = accepted_arguments(pipeline)
        other = guidance if guidance != self._guidance else None
        number = steps if steps != steps_of(pipeline, call) else None
        call = call_for(self.source, call, CallOptions(steps=number, guidance=other))
        if batch == call.images:
            return call
        prompts = call.prompts or 1
        name = next((name for name in COUNT_ARGUMENTS if name in accepted), None)
        if name is None or batch % prompts:
            raise UsageError(
                f"the call of {type(pipeline).__name__} cannot make {batch} images at once; use "
                f"--batch-sizes {call.images}"
            )
        return call.updated({name: batch // prompts})

    def prepare(self, part: str, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """Run the pipeline once, keep the inputs of its middle denoiser call, and warm the call up.

        Args:
            part: the denoiser.
            batch: number of images.
            steps: number of denoising steps.
            guidance: classifier-free guidance scale.

        Returns:
            `first_call_seconds`, which may include compilation, and `calls` per timing round.

        Raises:
            UsageError: the pipeline or its graphs do not support the call.
        """
        calls: list[TimedCall] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(lambda: module(*args, **kwargs))

        call = self._called_with(batch, steps, guidance)
        with ExitStack() as stack:
            for module in self._denoisers.values():
                handle = module.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
            run_call(self.source.pipeline, call, 0, "bench")
        if not calls:
            raise UsageError(f"{type(self.source.pipeline).__name__} does not call its denoiser")
        with torch.no_grad():
            return self._warm_up(calls[len(calls) // 2])

    def draw(
        self,
        batch: int,
        steps: int,
        seed: int,
        guidance: float,
        prompts: list[str] | None,
        turn: int | None,
        out: str | None,
    ) -> dict[str, Any]:
        """Call the pipeline; the random numbers depend only on `seed` and `turn`.

        Args:
            batch: number of images B.
            steps: number of denoising steps.
            seed: seed of the random numbers.
            guidance: classifier-free guidance scale.
            prompts: not used, since the call has its own.
            turn: index of the batch; None for a warm-up, which `prepare` has done already.
            out: output file for the result as a numpy array, in [-1, 1]: images float32[B,C,H,W], the
                frames of videos in the same form, or sounds float32[B,C,N]; None: no file.

        Returns:
            `seconds` of the whole call, and GPU energy in `joules` (None if not reported).
        """
        if turn is None:
            return {"seconds": 0.0, "joules": None}
        call = self._called_with(batch, steps, guidance)
        if "output_type" in accepted_arguments(self.source.pipeline):
            # Pictures would be rounded to 8 bits.
            call = call.updated({"output_type": "pt"})
        media, cost = self._timed(
            lambda: next(called_media(self.source, call, 1, seed + turn, silent))
        )
        if out is not None:
            sound = media.kind == "audio"
            parts = [part[None] if sound or part.ndim == 3 else part for part in media.tensors]
            stacked = torch.cat(parts)
            np.save(out, (stacked if sound else 2 * stacked - 1).numpy())
        return cost

    def operations(self, batch: int, steps: int, guidance: float) -> dict[str, Any]:
        """No count: the pipeline's inputs exist only during its call.

        Args:
            batch: number of images.
            steps: number of denoising steps.
            guidance: classifier-free guidance scale.
        """
        return {"operations": None}


def _opened(path: str, provider: str, threads: int) -> LoadedPipeline:
    opened = open_artefact(path, verify=False)
    if isinstance(opened, Checkpoint):
        return open_pipeline(opened.place, opened.config, recorded=True)
    return open_any(opened, provider, None if provider == TORCH else threads)
