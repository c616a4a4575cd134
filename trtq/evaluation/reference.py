"""The float model's images, which an evaluation compares with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from trtq.artefact.opened import Opened, open_artefact
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.evaluation.extractor import Extractor, load_extractor
from trtq.evaluation.metrics import (
    ImageScores,
    score_images,
)
from trtq.pipelines.draw import Conditioning, conditioning_for, draw
from trtq.progress import ProgressCallback, silent

__all__ = ["ReferenceSet", "draw_reference"]


class Sampling(TypedDict):
    """The sampling arguments of generated images."""

    steps: int
    seed: int
    guidance: float


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """The float model's images, which can be used for several evaluations.

    Attributes:
        source: the float model.
        conditioning: prompts or classes of the images.
        images: generated images, float32[B,C,H,W] in [-1, 1].
        extractor: feature extractor; None: there is neither a classifier nor `--features`.
        scores: scores of these images by the extractor; None without an extractor.
        steps: number of denoising steps.
        seed: seed of the initial noise.
        guidance: classifier-free guidance scale.
        seconds: duration of generating the images, in seconds.
    """

    source: LoadedPipeline
    conditioning: Conditioning
    images: Tensor
    extractor: Extractor | None
    scores: ImageScores | None
    steps: int
    seed: int
    guidance: float
    seconds: float

    @property
    def sampling(self) -> Sampling:
        """The arguments `steps`, `seed` and `guidance` of the images."""
        return {"steps": self.steps, "seed": self.seed, "guidance": self.guidance}

    @property
    def accuracy_name(self) -> str:
        """Name of the metric for the share of correctly recognised images, for this kind of model."""
        return "class_accuracy" if self.source.prompts is None else "faithfulness"


def draw_reference(
    reference: str | Path | Opened | Any,
    *,
    images: int,
    steps: int,
    seed: int,
    guidance: float | None = None,
    features: Path | None = None,
    judged: LoadedPipeline | None = None,
    progress: ProgressCallback = silent,
) -> ReferenceSet:
    """Generate and score the float model's images.

    Args:
        reference: the float model.
        images: number of images.
        steps: number of denoising steps.
        seed: seed of the initial noise.
        guidance: classifier-free guidance scale; None: the model's recommended scale.
        features: folder of a CLIP vision model or classifier; None: the classifier of the model.
            Without either, only SNR, PSNR and SSIM are computed.
        judged: the evaluated model; if the reference is another kind of model, it is refused before any
            image is generated.
        progress: callback with the stage's name, the completed work and the total.

    Raises:
        UsageError: the reference is not a float checkpoint or is another model than `judged`, or
            `images` is below 2.
    """
    opened = open_artefact(reference, verify=False)
    if opened.kind != "checkpoint":
        raise UsageError(
            f"the reference {opened.place} is of kind {opened.kind!r}; give the float checkpoint of it"
        )
    source = open_pipeline(opened.place, opened.config)
    if images < 2:
        raise UsageError(f"--images must be at least 2, got {images}")
    if judged is not None:
        source = _match(source, judged)
    extractor = load_extractor(source.folder, features)
    conditioning = conditioning_for(source, images)
    start = time.monotonic()
    drawn = draw(
        source,
        conditioning,
        steps=steps,
        seed=seed,
        guidance=guidance,
        progress=lambda done, total: progress("draw with the float model", done, total),
    )
    seconds = time.monotonic() - start
    scores = None if extractor is None else score_images(drawn, conditioning.labels, extractor)
    strength = source.guidance if guidance is None else guidance
    return ReferenceSet(
        source, conditioning, drawn, extractor, scores, steps, seed, strength, seconds
    )


def _match(reference: LoadedPipeline, judged: LoadedPipeline) -> LoadedPipeline:
    """The reference at the evaluated model's image size.

    Raises:
        UsageError: the models differ, so their images cannot be compared.
    """
    if judged.resized and reference.image_size != judged.image_size:
        height, width = judged.image_size
        reference = reference.sized(f"{height}x{width}")
    for what, judged_value, value in (
        ("classes", judged.classes, reference.classes),
        ("prompts", judged.prompts is not None, reference.prompts is not None),
        ("HEIGHT, WIDTH in pixels", judged.image_size, reference.image_size),
        ("sample of shape", judged.sample_shape, reference.sample_shape),
    ):
        if judged_value != value:
            raise UsageError(
                f"the reference {reference.name} is another model than {judged.name}: {what} {value}, "
                f"not {judged_value}; give the float checkpoint that it was made from"
            )
    return reference
