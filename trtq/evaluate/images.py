"""Drawing images for an evaluation, and putting them on one sheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trtq.diffusion.source import Source
from trtq.errors import NonFiniteError, UsageError
from trtq.seeds import seeded_generator

__all__ = ["contact_sheet", "draw", "labels_for", "save_png"]

BATCH = 125


def labels_for(source: Source, count: int) -> Tensor | None:
    """Class labels 0, 1, ... in turn, LongTensor[count]; None for a model without classes."""
    if not hasattr(source.pipeline, "classes"):
        return None
    return torch.arange(count) % int(source.pipeline.classes)


def draw(
    source: Source,
    count: int,
    *,
    steps: int,
    seed: int,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw images; image i of a seed starts from the same noise whatever draws it.

    Args:
        source: any pipeline that `open_any` gives.
        count: number of images B.
        steps: denoising steps.
        seed: of the starting noise.
        labels: LongTensor[B], by default `labels_for`.
        guidance: classifier-free guidance.
        batch: images drawn at once.
        progress: called with (images done, images in all).

    Returns:
        float32[B,C,H,W] in [-1, 1].

    Raises:
        UsageError: the count, the number of steps, or a kind of pipeline that cannot be drawn from yet.
        NonFiniteError: an image holds NaN.
    """
    if count < 1:
        raise UsageError(f"the number of images must be at least 1, got {count}")
    if not hasattr(source.pipeline, "classes"):
        raise UsageError(f"drawing with {type(source.pipeline).__name__} is not supported yet")
    source.timesteps(steps)
    chosen = labels_for(source, count) if labels is None else labels
    assert chosen is not None
    images = []
    for first in range(0, count, batch):
        part = chosen[first : first + batch]
        generators = [seeded_generator(seed, "image", first + i) for i in range(len(part))]
        drawn = source.pipeline(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        if not bool(torch.isfinite(drawn).all()):
            raise NonFiniteError(f"{source.name} draws images that hold NaN or infinity")
        images.append(drawn.float().clamp(-1, 1))
        if progress is not None:
            progress(min(first + batch, count), count)
    return torch.cat(images)


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


def save_png(sheet: np.ndarray, path: Path) -> None:
    """Write uint8[H,W,3] as PNG, complete or not at all.

    Raises:
        UsageError: the folder does not exist or cannot be written.
    """
    from PIL import Image

    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(sheet).save(partial, format="PNG")
        partial.rename(path)
    except OSError as err:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {err}") from err
