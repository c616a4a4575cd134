"""Image generation with any pipeline, from the same noise for the same seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.checkpoint.quiet import quiet_diffusers
from trtq.diffusion.encode import takes_negative
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import at_once
from trtq.diffusion.truncation import warn_of_truncation
from trtq.errors import ArtefactError, NonFiniteError, TrtqError, UsageError
from trtq.limits import MAX_IMAGES
from trtq.seeds import seeded_generator

__all__ = ["Conditioning", "conditioning_for", "draw"]

_FROM_PIPELINES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)
"""Exceptions of diffusers' pipelines whose components do not fit each other."""
_DIT_NULL_CLASS = 1000
"""Label that `DiTPipeline` passes for "no class", for any number of the model's classes."""
BATCH = 125
TEXT_BATCH = 50


@dataclass(frozen=True)
class Conditioning:
    """Classes or prompts of a set of images.

    Attributes:
        count: number of images B.
        classes: class of each image, LongTensor[B], for a model with classes.
        prompts: prompt of each image, for a text-to-image model.
        labels: expected label of each image, LongTensor[B], by question to a classifier.
    """

    count: int
    classes: Tensor | None = None
    prompts: Sequence[str] | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)


def conditioning_for(
    source: LoadedPipeline, count: int, *, class_label: int | None = None, prompt: str | None = None
) -> Conditioning:
    """Choose classes or evaluation prompts in turn, or one class or prompt for all images.

    Args:
        source: pipeline that generates the images.
        count: number of images B.
        class_label: class of every image; None: all classes in turn.
        prompt: prompt of every image; None: the evaluation prompts in turn.

    Returns:
        Classes or prompts of the B images.

    Raises:
        UsageError: the model does not take the class or prompt, or the count is out of range.
    """
    if not 1 <= count <= MAX_IMAGES:
        raise UsageError(f"the number of images must be 1 .. {MAX_IMAGES}, got {count}")
    if source.prompts is not None:
        if class_label is not None:
            raise UsageError("this model takes prompts, not classes: use --prompt")
        if prompt is not None:
            return Conditioning(count, prompts=[prompt] * count)
        judged = source.prompts.evaluation
        if not judged:
            turn = [
                source.prompts.calibration[i % len(source.prompts.calibration)]
                for i in range(count)
            ]
            return Conditioning(count, prompts=turn)
        chosen = [judged[index % len(judged)] for index in range(count)]
        questions = set(judged[0].labels).intersection(*(row.labels for row in judged))
        labels = {name: torch.tensor([row.labels[name] for row in chosen]) for name in questions}
        return Conditioning(count, prompts=[row.prompt for row in chosen], labels=labels)
    if prompt is not None:
        raise UsageError("this model accepts classes, not prompts: use --class-label")
    if source.classes is None:
        if class_label is not None:
            raise UsageError("this model accepts no classes")
        return Conditioning(count)
    classes = torch.arange(count) % source.classes
    if class_label is not None:
        if not 0 <= class_label < source.classes:
            raise UsageError(
                f"class labels must lie in 0 .. {source.classes - 1}, got {class_label}"
            )
        classes = torch.full((count,), class_label)
    return Conditioning(count, classes=classes, labels={"class": classes})


def draw(
    source: LoadedPipeline,
    conditioning: Conditioning,
    *,
    steps: int,
    seed: int,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw images; image i of a seed starts from the same noise in every pipeline.

    Args:
        source: a pipeline from `open_any`.
        conditioning: classes or prompts of the images.
        steps: number of denoising steps.
        seed: seed of the starting noise.
        guidance: classifier-free guidance scale; by default the scale that suits the model.
        negative_prompt: text that guidance steers away from; None: the pipeline's default.
        batch: maximum number of images per call of the pipeline.
        progress: callback that receives the number of finished images and the total.

    Returns:
        float32[B,C,H,W] in [-1, 1].

    Raises:
        UsageError: the number of steps is invalid, the negative prompt would have no effect, or the
            pipeline does not support guidance with this model.
        NonFiniteError: an image holds NaN or infinity.
    """
    source.check_steps(steps)
    chosen = source.guidance if guidance is None else guidance
    if negative_prompt is not None:
        _check_negative(source, negative_prompt, chosen)
    _check_null_class(source, chosen)
    if conditioning.prompts is not None:
        negatives = [] if not negative_prompt else [negative_prompt]
        warn_of_truncation(source.pipeline, [*conditioning.prompts, *negatives])
    if batch is None:
        max_batch = BATCH if conditioning.prompts is None else TEXT_BATCH
        batch = at_once(source.sample_shape, max_batch)
    images = []
    for first in range(0, conditioning.count, batch):
        part = slice(first, min(first + batch, conditioning.count))
        generators = [seeded_generator(seed, "image", i) for i in range(part.start, part.stop)]
        drawn = _call(source, conditioning, part, steps, generators, chosen, negative_prompt)
        if not bool(torch.isfinite(drawn).all()):
            raise NonFiniteError(f"{source.name} draws images that hold NaN or infinity")
        images.append(drawn.float().cpu().clamp(-1, 1))
        if progress is not None:
            progress(part.stop, conditioning.count)
    return torch.cat(images)


def _check_null_class(source: LoadedPipeline, guidance: float) -> None:
    """Raise if `DiTPipeline` would pass a label for "no class" that the model does not have."""
    classes = source.classes
    if type(source.pipeline).__name__ != "DiTPipeline" or guidance <= 1:
        return
    if classes is not None and classes < _DIT_NULL_CLASS:
        raise UsageError(
            f"{source.name} has the labels 0 .. {classes}, but with guidance {guidance:g} its "
            f"DiTPipeline passes label {_DIT_NULL_CLASS} for no class: leave out the guidance"
        )


def _check_negative(source: LoadedPipeline, negative_prompt: str, guidance: float) -> None:
    """Raise if a negative prompt would have no effect, unless it is empty."""
    if not negative_prompt:
        return
    if source.prompts is None or not takes_negative(source.pipeline, source.denoiser_name):
        raise UsageError(f"{source.name} accepts no negative prompt")
    if guidance <= 1:
        raise UsageError(
            f"a negative prompt changes nothing at guidance {guidance:g}: choose a guidance above 1, "
            "or leave it out"
        )


def _call(
    source: LoadedPipeline,
    conditioning: Conditioning,
    part: slice,
    steps: int,
    generators: list[torch.Generator],
    guidance: float,
    negative_prompt: str | None,
) -> Tensor:
    """Generate a part of the images with the pipeline's own call: float[B,C,H,W] in [-1, 1].

    Pipelines differ in their arguments, so only the arguments in the pipeline's signature are passed.
    """
    offered: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": generators,
        "output_type": "pt",
        "use_resolution_binning": False,
    }
    offered["height"], offered["width"] = source.image_size
    embedded = source.embedded_guidance
    offered["guidance_scale"] = guidance if embedded is None else embedded
    if conditioning.prompts is not None:
        offered["prompt"] = list(conditioning.prompts[part])
        if negative_prompt is not None:
            offered["negative_prompt"] = [negative_prompt] * len(offered["prompt"])
    elif conditioning.classes is not None:
        offered["class_labels"] = conditioning.classes[part].tolist()
    else:
        offered["batch_size"] = part.stop - part.start
    accepted = inspect.signature(source.pipeline.__call__).parameters
    if source.resized and "height" not in accepted:
        raise UsageError(
            f"{type(source.pipeline).__name__} draws images of the model's own size only"
        )
    try:
        with quiet_diffusers():
            images = source.pipeline(**{k: v for k, v in offered.items() if k in accepted}).images
    except TrtqError:
        raise
    except _FROM_PIPELINES as err:
        lines = str(err).strip().splitlines() or ["without a reason"]
        raise ArtefactError(
            f"{source.name}: its {type(source.pipeline).__name__} cannot be called: "
            f"{type(err).__name__}: {lines[0]}"
        ) from err
    if source.gives_raw_images:
        return images  # type: ignore[no-any-return]
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
    return images * 2 - 1
