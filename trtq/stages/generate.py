"""Images from any artefact."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from trtq.errors import UsageError
from trtq.evaluate.images import check_sheet, contact_sheet, draw, save_png, subjects_for
from trtq.progress import Reporter, silent
from trtq.stages.load import artefact_guidance, calibrated_steps, open_any

__all__ = ["generate"]

_SHEET_PIXELS = 96


def generate(
    path: str | Path | Any,
    out: str | Path,
    *,
    images: int = 1,
    class_label: int | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | None = None,
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
        negative_prompt: what the images are not to show; needs guidance above 1.
        steps: denoising steps; by default what the artefact was calibrated for, else 20.
        guidance: classifier-free guidance; by default what the artefact was calibrated with.
        size: `HEIGHTxWIDTH` in pixels; by default the model's own.
        seed: image i of a seed is the same in every call.
        provider: what runs it.
        report: called as work goes on.

    Returns:
        `output`, `images`, `labels`, `prompts`, `steps`, `seed`, `seconds`.

    Raises:
        TrtqError: see `trtq.errors`; no file is left.
    """
    target = Path(out)
    if target.suffix.lower() != ".png":
        raise UsageError(f"--output must end in .png, got {target.name!r}")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    source = open_any(path, provider)
    if size is not None:
        source.resize(size)
    check_sheet(images, *source.image_size)
    subjects = subjects_for(source, images, class_label=class_label, prompt=prompt)
    if guidance is None:
        guidance = artefact_guidance(path)
    count = steps or calibrated_steps(path) or 20
    start = time.monotonic()
    drawn = draw(
        source,
        subjects,
        steps=count,
        seed=seed,
        guidance=guidance,
        negative_prompt=negative_prompt,
        progress=lambda done, total: report("draw", done, total),
    )
    seconds = time.monotonic() - start
    columns = min(images, 10) if images % 10 == 0 else math.ceil(math.sqrt(images))
    scale = max(1, _SHEET_PIXELS // drawn.shape[-1])
    save_png(contact_sheet(drawn, columns, scale, gap=scale), target)
    return {
        "output": str(target),
        "images": images,
        "labels": None if subjects.classes is None else subjects.classes.tolist(),
        "prompts": None if subjects.prompts is None else list(subjects.prompts),
        "steps": count,
        "seed": seed,
        "seconds": round(seconds, 3),
    }
