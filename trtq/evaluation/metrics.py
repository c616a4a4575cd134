"""Metrics of an evaluation.

Letters: B images; C channels; H, W pixels; F features; K possible answers to a question.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from trtq._optional import require
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.sampling import at_once, predict, seeded_noise, spread, walk
from trtq.evaluation.extractor import Extractor
from trtq.evaluation.frechet import (
    Statistics,
    bootstrap_interval,
    feature_statistics,
    frechet_distance,
)
from trtq.quant.attention_channels import unscaled_outputs
from trtq.quant.hooks import captured_outputs
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

__all__ = [
    "ImageScores",
    "PixelScores",
    "inception_score",
    "layer_snr",
    "noise_prediction_snr",
    "pixel_scores",
    "precision_recall",
    "psnr_db",
    "score_images",
    "share_interval",
    "spatial_distance",
]

_NEIGHBOURS = 3
_SCORE_SPLITS = 10
_MAX_PSNR = 100.0


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Features and scores of a set of images.

    Attributes:
        features: features `[B,F]`.
        spatial: spatial features `[B,F']`.
        fd: Fréchet distance to the real images; None if there are no statistics of real images.
        fd_interval: 95 % bootstrap interval of `fd`; None if `fd` is None.
        accuracy: share of images whose answers all match the requested labels; None without labels.
        accuracy_interval: 95 % interval of `accuracy` (Wilson); None if `accuracy` is None.
        inception_score: inception score; None if the extractor has no questions.
    """

    features: Tensor
    spatial: Tensor
    fd: float | None
    fd_interval: tuple[float, float] | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    inception_score: float | None


def score_images(images: Tensor, labels: Mapping[str, Tensor], extractor: Extractor) -> ImageScores:
    """Compute features and scores of images.

    Args:
        images: images, `[B,C,H,W]`, in [-1, 1].
        labels: requested labels, LongTensor[B] by question; may be empty.
        extractor: feature extractor.
    """
    features = torch.cat([extractor.features(part) for part in torch.split(images, 500)])
    spatial = torch.cat([extractor.spatial_features(part) for part in torch.split(images, 500)])
    fd = fd_interval = accuracy = accuracy_interval = None
    if extractor.reference is not None:
        fd = frechet_distance(feature_statistics(features), extractor.reference)
        fd_interval = bootstrap_interval(features, extractor.reference)
    answers = extractor.answers(features)
    labelled = [name for name in answers if name in labels]
    if labelled:
        correct = torch.stack([answers[n].argmax(1) == labels[n] for n in labelled]).all(0)
        accuracy = float(correct.float().mean())
        accuracy_interval = share_interval(accuracy, len(images))
    score = inception_score(answers) if answers else None
    return ImageScores(features, spatial, fd, fd_interval, accuracy, accuracy_interval, score)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images, by Wilson's score (doi 10.2307/2276774).

    Unlike the normal approximation, the interval has a width even if all images are correct.

    Args:
        share: share of images, 0 .. 1.
        count: number of images.

    Returns:
        Lower and upper bound of the interval.
    """
    z2 = 1.96**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = (z2 * (share * (1 - share) + z2 / 4)) ** 0.5 / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


class _Logits(nn.Module):
    """Passes precomputed logits through torchmetrics, which expects images."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def inception_score(answers: Mapping[str, Tensor]) -> float:
    """Inception score `exp E KL(p(y|x) || p(y))` (arXiv 1606.03498) of a classifier, with ten splits.

    The answers to several questions are joined into one distribution over all combinations, assuming
    independence given the image; the maximum score is then the number of combinations.

    Args:
        answers: logits[B,K] by question.
    """
    image: Any = require("torchmetrics.image.inception")
    joint = torch.zeros(len(next(iter(answers.values()))), 1)
    for logits in answers.values():
        joint = (joint[:, :, None] + logits.log_softmax(1)[:, None, :]).flatten(1)
    # InceptionScore warns that it keeps all logits, and shuffles them with torch's global generator.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        metric = image.InceptionScore(_Logits(), splits=min(_SCORE_SPLITS, len(joint)))
        torch.manual_seed(0)
        metric.update(joint)
        mean, _ = metric.compute()
    return float(mean)


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) with three neighbours.

    Args:
        features: features of the evaluated images, `[B,F]`.
        reference: features of the reference images, `[B',F]`.

    Returns:
        Share of evaluated images on the reference manifold, and share of reference images on the
        evaluated manifold.
    """

    def radii(points: Tensor) -> Tensor:
        count = min(_NEIGHBOURS + 1, len(points))
        return torch.cdist(points, points).kthvalue(count, dim=1).values

    distance = torch.cdist(features, reference)
    precision = (distance <= radii(reference)[None, :]).any(1).float().mean()
    recall = (radii(features)[None, :] >= distance.T).any(1).float().mean()
    return float(precision), float(recall)


class PixelScores(TypedDict):
    """Means over images, with 95 % intervals by the normal approximation.

    Attributes:
        psnr_db: mean PSNR in dB.
        psnr_db_interval: interval of `psnr_db`.
        ssim: mean SSIM.
        ssim_interval: interval of `ssim`.
    """

    psnr_db: float
    psnr_db_interval: tuple[float, float]
    ssim: float
    ssim_interval: tuple[float, float]


def pixel_scores(images: Tensor, reference: Tensor) -> PixelScores:
    """Compare images[B,C,H,W] in [-1, 1] with reference images from the same noise.

    Equal images count as 100 dB. The window of SSIM has 11 pixels, or the largest odd number that fits
    in the image.
    """
    functional: Any = require("torchmetrics.functional.image")
    side = min(images.shape[-2:])
    window = min(11, side - 1 + side % 2)
    ssim = functional.structural_similarity_index_measure(
        images,
        reference,
        data_range=2.0,
        kernel_size=window,
        gaussian_kernel=window == 11,
        reduction="none",
    ).double()
    psnr = _psnr_of_each(images, reference)
    return {
        "psnr_db": float(psnr.mean()),
        "psnr_db_interval": _interval_of_mean(psnr),
        "ssim": float(ssim.mean()),
        "ssim_interval": _interval_of_mean(ssim),
    }


def _psnr_of_each(images: Tensor, reference: Tensor) -> Tensor:
    errors = (images - reference).double().square().flatten(1).mean(1)
    return (10 * (4 / errors).log10()).clamp_max(_MAX_PSNR)


def _interval_of_mean(values: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of values[B], by the normal approximation."""
    half = 1.96 * float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return mean - half, mean + half


def psnr_db(images: Tensor, reference: Tensor) -> float:
    """Mean PSNR in dB of images[B,C,H,W] in [-1, 1]; equal images count as 100 dB."""
    return float(_psnr_of_each(images, reference).mean())


def spatial_distance(scores: ImageScores, reference: ImageScores) -> float:
    """Fréchet distance between the spatial features of both sets (as sFID, arXiv 2103.03841)."""
    statistics: list[Statistics] = [feature_statistics(s.spatial) for s in (scores, reference)]
    return frechet_distance(*statistics)


def noise_prediction_snr(
    source: LoadedPipeline,
    reference: LoadedPipeline,
    *,
    steps: int,
    seed: int,
    images: int = 64,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """SNR in dB of the predicted noise relative to the float model, per step, cleanest first.

    Both models get the same points of the float model's trajectory, so errors do not accumulate.

    Args:
        source: the model to evaluate.
        reference: the float model.
        steps: number of denoising steps.
        seed: seed of the initial noise.
        images: number of trajectories.
        guidance: classifier-free guidance scale.
        progress: callback with the completed and the total number of steps.
    """
    schedule = reference.schedule(steps)
    images = at_once(reference.sample_shape, images)
    conditions = reference.draw_conditions(images, seeded_generator(seed, "snr conditions"))
    noise = seeded_noise(reference.sample_shape, seed, 0, images)
    rows = []
    for point in walk(reference.denoiser, schedule, noise, conditions, guidance):
        with torch.no_grad():
            other = predict(source.denoiser, point.x, point.timestep, conditions, guidance)
        rows.append(snr_db(point.predicted, other))
        if progress is not None:
            progress(point.position + 1, len(schedule))
    return rows[::-1]


def layer_snr(
    source: LoadedPipeline, reference: LoadedPipeline, *, steps: int, seed: int, images: int = 16
) -> dict[str, float]:
    """SNR in dB of each linear and convolution output relative to the float model, worst first.

    Both models get the same inputs, from steps along the float model's trajectory. The error of a layer
    includes the errors of the layers before it.

    Args:
        source: the model to evaluate.
        reference: the float model.
        steps: number of denoising steps.
        seed: seed of the initial noise.
        images: number of samples.
    """
    schedule = reference.schedule(steps)
    images = at_once(reference.sample_shape, images)
    conditions = reference.draw_conditions(images, seeded_generator(seed, "layer conditions"))
    noise = seeded_noise(reference.sample_shape, seed, 0, images)
    x, timesteps = spread(reference.denoiser, schedule, noise, conditions)
    names = [
        name
        for name, module in reference.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    outputs = []
    for model in (reference, source):
        with captured_outputs(model.model, names) as seen, torch.no_grad():
            predict(model.denoiser, x, timesteps, conditions)
        outputs.append(unscaled_outputs(model.model, seen))
    snr = {name: snr_db(outputs[0][name], outputs[1][name]) for name in names if name in outputs[1]}
    return dict(sorted(snr.items(), key=lambda item: item[1]))
