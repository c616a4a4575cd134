"""Image generation from any artefact to PNG files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.calls.user_call import UserCall
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.pipelines.called import CallOptions, is_called
from trtq.pipelines.draw import Conditioning, conditioning_for, draw
from trtq.pipelines.generate_called import CallRequest, generate_called
from trtq.pipelines.open import open_any
from trtq.pipelines.output_files import check_files, output_files, save_each
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
    call: str | Path | Mapping[str, Any] | UserCall | None = None,
    inputs: Mapping[str, Any] | None = None,
    provider: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> GenerateResult:
    """Generate images, on one PNG sheet or as a PNG file each; also videos and sounds.

    Every file holds prompt, seed and settings as PNG text, see `trtq.png_text`. An artefact that was
    recorded inside its pipeline's call repeats that call with the changes given here; a pipeline that
    trtq does not know is called with a prompt, the number of steps and the changes given here.

    Args:
        artefact: a run, an ONNX or engine folder, a checkpoint, a pipeline object, or one of them
            opened.
        out: a file name that ends in `.png` for one sheet, `.gif` or `.mp4` for one video, `.wav` for
            one sound, or a folder for one file per result (`image-0000.png`, `video-0000.gif`,
            `audio-0000.wav` and so on).
        images: number of images.
        class_label: class of every image; by default all classes in turn.
        prompt: prompt of every image, for a text-to-image model.
        negative_prompt: text that guidance steers away from; requires a guidance scale above 1.
        steps: number of denoising steps; by default the number of the calibration, or 20.
        guidance: classifier-free guidance scale; by default the value used for calibration.
        size: `HEIGHTxWIDTH` in pixels; by default the size of the artefact.
        seed: seed of the starting noise; image i of a seed is the same in every call.
        call: arguments of the pipeline's call: a TOML file, see `trtq.calls.files.read_call`, a dict or
            a `UserCall`.
        inputs: further arguments of the pipeline's call, e.g. pictures; the options above take
            precedence over both.
        provider: provider that runs the artefact, see `trtq.pipelines.open.open_any`.
        overwrite: replace existing files.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The written files and their settings.

    Raises:
        TrtqError: see `trtq.errors`; no new file is left.
    """
    opened = open_artefact(artefact, verify=False)
    if is_called(opened, call=call is not None or bool(inputs)):
        options = CallOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            size=size,
            class_label=class_label,
        )
        asked = CallRequest(images, seed, options, call, inputs)
        return generate_called(opened, out, asked, provider, overwrite, progress)
    target = Path(out)
    files = output_files(target, str(out), images)
    check_files(target, files, artefact, overwrite=overwrite)
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
        save_each(sheets, files, texts, overwrite=overwrite)
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
