"""Feature extractors of the metrics: the classifier of a demo model, or a CLIP vision model.

Letters: B images; C channels; H, W pixels; F features; K possible answers to a question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trtq.errors import ArtefactError, UsageError
from trtq.evaluation.classifier import ImageClassifier, is_classifier, load_classifier
from trtq.evaluation.frechet import Statistics

__all__ = ["ClassifierExtractor", "ClipExtractor", "Extractor", "load_extractor"]

CLASSIFIER = "classifier"
_SPATIAL_CHANNELS = 7


class Extractor(Protocol):
    """Maps images to the features that the metrics compare."""

    name: str
    reference: Statistics | None
    """Statistics of real images; None if the float model's images are the reference."""

    def features(self, images: Tensor) -> Tensor:
        """images[B,C,H,W] in [-1, 1] -> features[B,F]."""

    def spatial_features(self, images: Tensor) -> Tensor:
        """images[B,C,H,W] in [-1, 1] -> features[B,F'] that depend on positions."""

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """features[B,F] -> logits[B,K] by question; empty for a model without questions."""


class ClassifierExtractor:
    """The small classifier that ships with a demo model.

    Args:
        folder: classifier folder.
    """

    def __init__(self, folder: Path) -> None:
        model, reference = load_classifier(folder)
        self.name = "the model's own classifier"
        self.model: ImageClassifier = model
        self.reference: Statistics | None = Statistics(reference["mean"], reference["covariance"])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See `Extractor`."""
        return self.model.features(images)

    @torch.no_grad()
    def spatial_features(self, images: Tensor) -> Tensor:
        """The first seven channels of the last convolution, as in sFID (arXiv 2103.03841)."""
        maps: Tensor = self.model.body[:-2](images)
        return maps[:, :_SPATIAL_CHANNELS].flatten(1)

    @torch.no_grad()
    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        return self.model.answers(features)


class ClipExtractor:
    """A CLIP vision model in a local folder, in transformers' layout and safetensors.

    Args:
        folder: model folder.

    Raises:
        ArtefactError: the model cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from transformers import CLIPVisionModelWithProjection

        try:
            self.model: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as err:
            raise ArtefactError(f"{folder} does not hold a CLIP vision model: {err}") from err
        self.model.train(False)
        self.name = f"CLIP ({folder.name})"
        self.reference: Statistics | None = None

    def _pixels(self, images: Tensor) -> Tensor:
        """Resize and normalise images as in CLIP's training."""
        size = int(self.model.config.image_size)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        images = torch.nn.functional.interpolate(
            images / 2 + 0.5, (size, size), mode="bicubic", antialias=True
        )
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
        return (images.clamp(0, 1) - mean) / deviation

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The projected image embedding."""
        return torch.cat(
            [self.model(self._pixels(part)).image_embeds for part in torch.split(images, 64)]
        )

    @torch.no_grad()
    def spatial_features(self, images: Tensor) -> Tensor:
        """The first seven channels of every patch in the last layer."""
        parts = []
        for part in torch.split(images, 64):
            states = self.model(self._pixels(part), output_hidden_states=True).hidden_states[-1]
            parts.append(states[:, 1:, :_SPATIAL_CHANNELS].flatten(1))
        return torch.cat(parts)

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """An empty dict: CLIP has no questions."""
        return {}


def load_extractor(model_folder: Path | None, given: Path | None = None) -> Extractor | None:
    """Load the feature extractor.

    Args:
        model_folder: folder of the float model, whose classifier is the default; None: no folder.
        given: folder with a CLIP vision model or a classifier of trtq; None: the default.

    Returns:
        The extractor, or None if the float model has no classifier and no folder is given. Without an
        extractor, Fréchet distance, precision, recall and inception score are not available.

    Raises:
        UsageError: the given folder does not exist.
        ArtefactError: the extractor cannot be loaded.
    """
    if given is not None:
        if not given.is_dir():
            raise UsageError(f"--features {given} is not a folder")
        return ClassifierExtractor(given) if is_classifier(given) else ClipExtractor(given)
    if model_folder is None or not (model_folder / CLASSIFIER).is_dir():
        return None
    return ClassifierExtractor(model_folder / CLASSIFIER)
