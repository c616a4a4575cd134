"""The numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtq.diffusion.sampling import predict, seeded_noise, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.diffusion.source import Source
from trtq.errors import UsageError
from trtq.evaluate.classifier import load_classifier
from trtq.evaluate.frechet import feature_statistics, frechet_distance
from trtq.export.parity import snr_db
from trtq.seeds import seeded_generator

__all__ = ["ImageScores", "noise_prediction_snr", "score_images"]


@dataclass(frozen=True)
class ImageScores:
    """What the shipped classifier thinks of a set of images.

    Attributes:
        fd: Fréchet distance to the real data in the classifier's features.
        class_accuracy: share of images recognised as the class that was asked for.
    """

    fd: float
    class_accuracy: float


def score_images(images: Tensor, labels: Tensor, classifier_folder: Path) -> ImageScores:
    """Judge images[B,C,H,W] that were asked to show `labels[B]`.

    Raises:
        UsageError: the model ships no classifier.
    """
    if not classifier_folder.is_dir():
        raise UsageError(f"the reference model has no classifier ({classifier_folder})")
    classifier, reference = load_classifier(classifier_folder)
    with torch.no_grad():
        features = classifier.features(images)
        guessed = classifier.answers(features)["class"].argmax(1)
    mean, covariance = feature_statistics(features)
    return ImageScores(
        frechet_distance(mean, covariance, reference["mean"], reference["covariance"]),
        float((guessed == labels).float().mean()),
    )


def noise_prediction_snr(
    source: Source,
    reference: Source,
    *,
    steps: int,
    seed: int,
    images: int = 64,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """SNR in dB of the noise prediction against the float model's, per step, cleanest first.

    Both see the same points of the float model's trajectory, so errors do not add up along it.
    """
    schedule = NoiseSchedule.of(reference.pipeline.scheduler, steps)
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
