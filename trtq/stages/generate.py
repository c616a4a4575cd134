"""Images from any artefact."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from trtq.errors import UsageError
from trtq.evaluate.images import contact_sheet, draw, labels_for, save_png
from trtq.progress import Reporter, silent
from trtq.stages.load import calibrated_steps, open_any

__all__ = ["generate"]

_SHEET_PIXELS = 96


def generate(
    path: str | Path | Any,
    out: str | Path,
    *,
    images: int = 1,
    class_label: int | None = None,
    prompt: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    provider: str | None = None,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Draw images and write them on one PNG sheet.

    Args:
        path: a run, an ONNX folder or a checkpoint.
        out: the PNG.
        images: how many.
        class_label: the class of all of them; by default all classes in turn.
        prompt: a text; only for text-to-image models.
        steps: denoising steps; by default what the artefact was calibrated for, else 20.
        guidance: classifier-free guidance.
        seed: image i of a seed is the same in every call.
        provider: what runs it.
        report: called as work goes on.

    Returns:
        `output`, `images`, `labels`, `steps`, `seed`, `seconds`.

    Raises:
        TrtqError: see `trtq.errors`; no file is left.
    """
    target = Path(out)
    if target.suffix.lower() != ".png":
        raise UsageError(f"--output must end in .png, got {target.name!r}")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    source = open_any(path, provider)
    if prompt is not None:
        raise UsageError("this model takes classes, not prompts: use --class-label")
    labels = labels_for(source, images)
    if class_label is not None:
        if labels is None:
            raise UsageError("this model has no classes")
        labels = torch.full((images,), class_label)
    count = steps or calibrated_steps(path) or 20
    start = time.monotonic()
    drawn = draw(
        source,
        images,
        steps=count,
        seed=seed,
        labels=labels,
        guidance=guidance,
        progress=lambda done, total: report("draw", done, total),
    )
    seconds = time.monotonic() - start
    columns = min(images, 10) if images % 10 == 0 else math.ceil(math.sqrt(images))
    scale = max(1, _SHEET_PIXELS // drawn.shape[-1])
    save_png(contact_sheet(drawn, columns, scale, gap=scale), target)
    return {
        "output": str(target),
        "images": images,
        "labels": labels.tolist() if labels is not None else None,
        "steps": count,
        "seed": seed,
        "seconds": round(seconds, 3),
    }
