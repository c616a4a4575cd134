"""Generation through a pipeline's own call: pictures, videos and sounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtq.artefact.opened import Opened
from trtq.calls.user_call import UserCall, run_call
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.limits import MAX_IMAGES
from trtq.pipelines.called import CallOptions, call_for, open_called, steps_of
from trtq.pipelines.media import Media, media_of
from trtq.pipelines.media_target import MediaTarget, MediaTexts
from trtq.pipelines.result import GenerateResult
from trtq.progress import ProgressCallback

__all__ = ["CallRequest", "called_media", "generate_called"]


@dataclass(frozen=True)
class CallRequest:
    """Requested results of a pipeline's own call.

    Attributes:
        images: number of calls.
        seed: seed of the random numbers; call i of a seed is the same in every request.
        options: options that change the call.
        call: arguments of the call, see `trtq.pipelines.called.call_for`.
        inputs: further arguments of the call.
    """

    images: int
    seed: int
    options: CallOptions = field(default_factory=CallOptions)
    call: str | Path | Mapping[str, Any] | UserCall | None = None
    inputs: Mapping[str, Any] | None = None


def generate_called(
    opened: Opened,
    out: str | Path,
    request: CallRequest,
    provider: str | None,
    overwrite: bool,
    progress: ProgressCallback,
) -> GenerateResult:
    """Generate with a pipeline's own call; see `trtq.pipelines.generate.generate`."""
    if not 1 <= request.images <= MAX_IMAGES:
        raise UsageError(f"the number of images must be 1 .. {MAX_IMAGES}, got {request.images}")
    target = MediaTarget.checked(out, request.images, opened, overwrite=overwrite)
    source, recorded = open_called(opened, provider)
    call = call_for(source, recorded, request.options, request.call, request.inputs)
    texts = MediaTexts(source, call, request.seed)
    start = time.monotonic()
    results = called_media(source, call, request.images, request.seed, progress)
    files, media, count = target.write(results, texts, request.images, overwrite=overwrite)
    return GenerateResult(
        output=str(target.path),
        files=[str(file) for file in files],
        images=count,
        labels=None,
        prompts=texts.prompts(count),
        steps=steps_of(source.pipeline, call),
        seed=request.seed,
        seconds=round(time.monotonic() - start, 3),
        media=None if media == "image" else media,
    )


def called_media(
    source: LoadedPipeline,
    call: UserCall,
    count: int,
    seed: int,
    progress: ProgressCallback,
    stage: str = "draw",
) -> Iterator[Media]:
    """The results of a number of calls, each with its own random numbers.

    Args:
        source: the pipeline.
        call: arguments of the call.
        count: number of calls.
        seed: seed; call i of a seed is the same in every pipeline.
        progress: callback that receives the stage's name, the work done and the total.
        stage: name of the stage.
    """
    arguments = {name: value for name, value in call.arguments.items() if name != "return_dict"}
    for index in range(count):
        result = run_call(source.pipeline, UserCall(arguments), seed, "image", index)
        yield media_of(result, source.pipeline, raw=source.gives_raw_images)
        progress(stage, index + 1, count)
