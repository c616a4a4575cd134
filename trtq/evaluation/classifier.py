"""The small image classifier that ships with a demo model, and its folder format.

The classifier predicts one or more attributes of an image, such as the digit, or colour and shape;
the code calls an attribute a question and its values answers.
Letters: B images; C channels; H, W pixels; F features; K possible answers to a question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.documents import read_object
from trtq.errors import ArtefactError

__all__ = ["ImageClassifier", "is_classifier", "load_classifier", "save_classifier"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class ImageClassifier(nn.Module):
    """Three convolutions, a linear layer whose output is the feature space of the metrics, and heads.

    Args:
        channels: number C of image channels.
        size: image height and width H = W, in pixels; a multiple of 4.
        heads: number K of possible answers, by question.
        width: number of output channels of the first convolution.
        features: dimension F of the feature space.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 8,
        heads: Mapping[str, int] | None = None,
        width: int = 24,
        features: int = 48,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "size": size,
            "heads": dict(heads or {"class": 10}),
            "width": width,
            "features": features,
        }
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, features),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(features, values) for name, values in self.config["heads"].items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """images[B,C,H,W] in [-1, 1] -> features[B,F], before the last ReLU."""
        out: Tensor = self.body(images)
        return out

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """features[B,F] -> logits[B,K] by question."""
        hidden = torch.relu(features)
        return {name: head(hidden) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images[B,C,H,W] in [-1, 1] -> logits[B,K] by question."""
        return self.answers(self.features(images))


def save_classifier(model: ImageClassifier, folder: Path, reference: dict[str, Tensor]) -> None:
    """Write the classifier in half precision, with the feature statistics of the real images.

    Args:
        model: the trained classifier.
        folder: output folder, created if absent.
        reference: `mean[F]` and `covariance[F,F]` (float64) of the features of real images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    tensors |= {f"reference.{name}": value.contiguous() for name, value in reference.items()}
    save_file(tensors, folder / WEIGHTS_NAME)


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a classifier, according to its configuration."""
    try:
        return "heads" in read_object(folder / CONFIG_NAME, finite=False)
    except ArtefactError:
        return False


def load_classifier(folder: Path) -> tuple[ImageClassifier, dict[str, Tensor]]:
    """Read a classifier folder.

    Returns:
        The classifier in float32 and evaluation mode, and `mean[F]` and `covariance[F,F]` by name,
        float64.

    Raises:
        ArtefactError: a file is missing, or was not written by `save_classifier`.
    """
    try:
        config = read_object(folder / CONFIG_NAME)
        tensors = load_file(folder / WEIGHTS_NAME)
        model = ImageClassifier(**config)
        reference = {
            name: tensors.pop(f"reference.{name}").double() for name in ("mean", "covariance")
        }
        model.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as err:
        raise ArtefactError(f"{folder} does not hold a classifier: {err}") from err
    return model.eval().requires_grad_(False), reference
