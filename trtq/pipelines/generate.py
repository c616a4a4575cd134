"""Image generation from any artefact to PNG files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trtq.artefact.folder import check_outside_artefacts
from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.artefact.outputs import check_file, check_place
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.pipelines.draw import Conditioning, conditioning_for, draw
from trtq.pipelines.open import open_any
from trtq.pipelines.result import GenerateResult
from trtq.pipelines.sheet import check_sheet, contact_sheet, save_png
from trtq.png_text import generation_texts
from trtq.progress import ProgressCallback, silent

__all__ = ["generate"]

_SHEET_PIXELS = 96


def generate(
    artefact: str | Path | Opened | Any,
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
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> GenerateResult:
    """Generate images, on one PNG sheet or as a PNG file each.

    Every file holds prompt, seed and settings as PNG text, see `trtq.png_text`.

    Args:
        artefact: a run, an ONNX or engine folder, a checkpoint, a pipeline object, or one of them
            opened.
        out: a file name that ends in `.png` for one sheet, or a folder for one file per image
            (`image-0000.png` and so on).
        images: number of images.
        class_label: class of every image; by default all classes in turn.
        prompt: prompt of every image, for a text-to-image model.
        negative_prompt: text that guidance steers away from; requires a guidance scale above 1.
        steps: number of denoising steps; by default the number of the calibration, or 20.
        guidance: classifier-free guidance scale; by default the value used for calibration.
        size: `HEIGHTxWIDTH` in pixels; by default the size of the artefact.
        seed: seed of the starting noise; image i of a seed is the same in every call.
        provider: provider that runs the artefact, see `trtq.pipelines.open.open_any`.
        overwrite: replace existing files.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The written files and their settings.

    Raises:
        TrtqError: see `trtq.errors`; no new file is left.
    """
    target = Path(out)
    files = _files(target, str(out), images)
    _check_files(target, files, artefact, overwrite=overwrite)
    opened = open_artefact(artefact, verify=False)
    source = open_any(opened, provider)
    if size is not None:
        source = source.sized(size)
    check_sheet(images, *source.image_size)
    conditioning = conditioning_for(source, images, class_label=class_label, prompt=prompt)
    settings = _Settings(
        steps=steps or opened.steps or DEFAULT_STEPS,
        seed=seed,
        guidance=opened.guidance if guidance is None else guidance,
        negative_prompt=negative_prompt,
    )
    start = time.monotonic()
    drawn = draw(
        source,
        conditioning,
        **asdict(settings),
        progress=lambda done, total: progress("draw", done, total),
    )
    seconds = time.monotonic() - start
    shape = (drawn.shape[-2], drawn.shape[-1])
    texts = partial(_texts, source, conditioning, settings, shape)
    if files == [target]:
        columns = min(images, 10) if images % 10 == 0 else math.ceil(math.sqrt(images))
        scale = max(1, _SHEET_PIXELS // drawn.shape[-1])
        sheet = contact_sheet(drawn, columns, scale, gap=scale)
        save_png(sheet, target, texts(0), overwrite=overwrite)
    else:
        sheets = [contact_sheet(drawn[index : index + 1], 1) for index in range(images)]
        _save_each(sheets, files, texts, overwrite=overwrite)
    return GenerateResult(
        output=str(target),
        files=[str(file) for file in files],
        images=images,
        labels=None if conditioning.classes is None else conditioning.classes.tolist(),
        prompts=None if conditioning.prompts is None else list(conditioning.prompts),
        steps=settings.steps,
        seed=seed,
        seconds=round(seconds, 3),
    )


@dataclass(frozen=True)
class _Settings:
    """Settings that all images share; see `generate`."""

    steps: int
    seed: int
    guidance: float | None
    negative_prompt: str | None


def _check_files(target: Path, files: Sequence[Path], source: Any, *, overwrite: bool) -> None:
    """Raise unless the files may be written, before any long work.

    Raises:
        UsageError: a file must not be replaced, or a path is not writable.
    """
    if files != [target]:
        check_place(target, source=source)
    if files == [target] or target.is_dir():
        for file in files:
            check_file(file, overwrite=overwrite, source=source)
    check_outside_artefacts(files[0])


def _texts(
    source: LoadedPipeline,
    conditioning: Conditioning,
    settings: _Settings,
    size: tuple[int, int],
    index: int,
) -> dict[str, str]:
    """The PNG texts of one image.

    Args:
        source: the pipeline.
        conditioning: classes or prompts of the images.
        settings: settings that all images share.
        size: height and width in pixels.
        index: index of the image, from 0.
    """
    prompts, classes = conditioning.prompts, conditioning.classes
    return generation_texts(
        model=source.name,
        prompt=None if prompts is None else prompts[index],
        label=None if classes is None else int(classes[index]),
        seed=settings.seed,
        image=index,
        steps=settings.steps,
        guidance=source.guidance if settings.guidance is None else settings.guidance,
        size=size,
        negative_prompt=settings.negative_prompt,
    )


def _save_each(
    sheets: Sequence[np.ndarray],
    files: Sequence[Path],
    texts: Callable[[int], dict[str, str]],
    *,
    overwrite: bool,
) -> None:
    """Write one PNG file per image; if a file cannot be written, remove the new files."""
    folder = files[0].parent
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    try:
        for index, (sheet, file) in enumerate(zip(sheets, files, strict=True)):
            new = not file.exists()
            save_png(sheet, file, texts(index), overwrite=overwrite)
            written += [file] if new else []
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _files(target: Path, given: str, images: int) -> list[Path]:
    """The files to write: one sheet, or one per image in a folder.

    Raises:
        UsageError: the name has a suffix other than `.png`, its parent folder does not exist, or a file
            has the name of the folder.
    """
    folder = target.is_dir() or given.endswith(("/", os.sep)) or not target.suffix
    if not folder and target.suffix.lower() != ".png":
        raise UsageError(
            f"--output must end in .png for one sheet, or name a folder for one file per image; got "
            f"{target.name!r}"
        )
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    if not folder:
        return [target]
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; give a name that ends in .png, or a folder")
    digits = max(4, len(str(images - 1)))
    return [target / f"image-{index:0{digits}d}.png" for index in range(images)]
