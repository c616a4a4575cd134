"""Drawing images for an evaluation, and putting them on one sheet."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.artefact.outputs import new_file
from trtq.diffusion.encode import takes_negative
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.sampling import at_once
from trtq.diffusion.truncation import warn_of_truncation
from trtq.errors import ArtefactError, NonFiniteError, TrtqError, UsageError
from trtq.limits import MAX_IMAGES
from trtq.png_text import with_texts
from trtq.seeds import seeded_generator

__all__ = ["Conditioning", "check_sheet", "conditioning_for", "contact_sheet", "draw", "save_png"]

_FROM_PIPELINES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
)
"""What diffusers' pipelines raise where their components do not fit each other."""
BATCH = 125
TEXT_BATCH = 50
MAX_PIXELS = 1 << 27
"""Of all images of one sheet together; in float32 they take 1.5 GB."""


@dataclass(frozen=True)
class Conditioning:
    """What images are to show.

    Attributes:
        count: number of images B.
        classes: LongTensor[B], for a model with classes.
        prompts: B texts, for a text-to-image model.
        labels: what a classifier must answer, LongTensor[B] by question.
    """

    count: int
    classes: Tensor | None = None
    prompts: Sequence[str] | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)


def conditioning_for(
    source: LoadedPipeline, count: int, *, class_label: int | None = None, prompt: str | None = None
) -> Conditioning:
    """Classes or evaluation prompts in turn, unless one class or prompt is asked for.

    Raises:
        UsageError: the model does not take what was asked for, or the count is no number of images.
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
        questions = set(judged[0].labels).intersection(*(one.labels for one in judged))
        labels = {name: torch.tensor([one.labels[name] for one in chosen]) for name in questions}
        return Conditioning(count, prompts=[one.prompt for one in chosen], labels=labels)
    if prompt is not None:
        raise UsageError("this model takes classes, not prompts: use --class-label")
    if source.classes is None:
        if class_label is not None:
            raise UsageError("this model takes no classes")
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
    """Draw images; image i of a seed starts from the same noise whatever draws it.

    Args:
        source: any pipeline that `open_any` gives.
        conditioning: what to draw.
        steps: denoising steps.
        seed: of the starting noise.
        guidance: classifier-free guidance; by default what the model is meant for.
        negative_prompt: what the images are not to show; by default what the pipeline has for none.
        batch: images drawn at once.
        progress: called with (images done, images in all).

    Returns:
        float32[B,C,H,W] in [-1, 1].

    Raises:
        UsageError: the number of steps, or a negative prompt that would change nothing.
        NonFiniteError: an image holds NaN.
    """
    source.check_steps(steps)
    chosen = source.guidance if guidance is None else guidance
    if negative_prompt is not None:
        _check_negative(source, negative_prompt, chosen)
    if conditioning.prompts is not None:
        told = [] if not negative_prompt else [negative_prompt]
        warn_of_truncation(source.pipeline, [*conditioning.prompts, *told])
    if batch is None:
        most = BATCH if conditioning.prompts is None else TEXT_BATCH
        batch = at_once(source.sample_shape, most)
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


def _check_negative(source: LoadedPipeline, negative_prompt: str, guidance: float) -> None:
    """Nothing, if the images depend on the negative prompt, or it is empty."""
    if not negative_prompt:
        return
    if source.prompts is None or not takes_negative(source.pipeline):
        raise UsageError(f"{source.name} takes no negative prompt")
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
    """Some of the images through the pipeline's own call, float[B,C,H,W] in [-1, 1].

    Pipelines differ in what they take and give: each is asked for what its signature knows.
    """
    offered: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": generators,
        "output_type": "pt",
        "use_resolution_binning": False,
    }
    offered["height"], offered["width"] = source.image_size
    told = source.embedded_guidance
    offered["guidance_scale"] = guidance if told is None else told
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


def check_sheet(count: int, height: int, width: int) -> None:
    """Nothing, if so many images of `height` times `width` pixels fit on one sheet.

    Raises:
        UsageError: they are too many to be held in memory at once.
    """
    most = max(1, MAX_PIXELS // (height * width))
    if count > most:
        raise UsageError(
            f"{count} images of {height}x{width} pixels (HEIGHTxWIDTH) are too many for one sheet; "
            f"choose at most {most}"
        )


def contact_sheet(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """images[B,C,H,W] in [-1, 1] on one uint8[H',W',3] sheet, row by row, on white."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(
    sheet: np.ndarray,
    path: Path,
    texts: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write uint8[H,W,3] as PNG, complete or not at all.

    Args:
        sheet: pixels.
        path: the file.
        texts: what the file says of itself, see `trtq.png_text`.
        overwrite: replace a file that is there.

    Raises:
        UsageError: the folder does not exist or cannot be written, or the file is there already.
        ArtefactError: the disk is full, or fails.
    """
    from PIL import Image

    buffer = io.BytesIO()
    with new_file(path, overwrite=overwrite) as partial:
        Image.fromarray(sheet).save(buffer, format="PNG")
        partial.write_bytes(with_texts(buffer.getvalue(), texts or {}))
