"""Train the digits model that ships with trtq, and its classifier.

`python -m trtq.demo.train_digits --output DIR` needs only the 1,797 handwritten digits that come with
scikit-learn. On the same machine, the same seed gives the same files.

The denoiser is a class-conditional `UNet2DModel` on 8 x 8 pixels that predicts the noise (DDPM,
arXiv 2006.11239, eq. 14). Class 10 means "no class": 10 % of the labels are dropped, which enables
classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.evaluation.classifier import ImageClassifier, save_classifier

CLASSES = 10
NO_CLASS = 10
LABEL_DROP = 0.1
TIMESTEPS = 1000

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (48, 80),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "num_class_embeds": CLASSES + 1,
}
SCHEDULER = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": True,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def load_digits() -> tuple[Tensor, Tensor]:
    """images[1797,1,8,8] in [-1, 1] and labels[1797], from scikit-learn."""
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(data.target).long()


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to one pixel, so that the classifier does not depend on the position."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(0, 3, (2, len(images)), generator=generator)
    size = images.shape[-1]
    rows = dy[:, None] + torch.arange(size)
    columns = dx[:, None] + torch.arange(size)
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train_classifier(
    images: Tensor, labels: Tensor, seed: int, epochs: int
) -> tuple[ImageClassifier, float]:
    """Train on 80 % of the digits; return the model and its accuracy on the other 20 %.

    Args:
        images: images of digits, float32[B,1,8,8] in [-1, 1].
        labels: digits, LongTensor[B].
        seed: seed of weights and batches.
        epochs: number of epochs.

    Returns:
        The classifier, and its accuracy on the other 20 %, 0 .. 1.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = ImageClassifier(channels=1, size=8, heads={"class": CLASSES})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batch = 64
    updates = epochs * math.ceil(len(train) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    for _ in range(epochs):
        for chosen in torch.split(train[torch.randperm(len(train), generator=generator)], batch):
            x = shift(images[chosen], generator)
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
            loss = functional.cross_entropy(model(x)["class"], labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (
            (model(images[held_out])["class"].argmax(1) == labels[held_out]).float().mean().item()
        )
    return model, accuracy


def train_denoiser(images: Tensor, labels: Tensor, seed: int, iterations: int, batch: int) -> Any:
    """Minimise the error of the predicted noise; return the model with moving-average weights.

    Args:
        images: images of digits, float32[B,1,8,8] in [-1, 1].
        labels: digits, LongTensor[B].
        seed: seed of weights and batches.
        iterations: number of updates.
        batch: number of images per update.

    Returns:
        The UNet with moving-average weights.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = UNet2DModel(**UNET)
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=iterations, pct_start=0.1
    )
    start = time.monotonic()
    running = 1.0
    for iteration in range(iterations):
        chosen = torch.randint(0, len(images), (batch,), generator=generator)
        # One timestep per stratum has the expectation of independent samples and a lower variance.
        offsets = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (offsets * TIMESTEPS).long().clamp_max(TIMESTEPS - 1)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROP
        noise = torch.randn(images[chosen].shape, generator=generator)
        noisy = scheduler.add_noise(images[chosen], noise, timesteps)
        predicted = model(
            noisy, timesteps, class_labels=labels[chosen].masked_fill(dropped, NO_CLASS)
        ).sample
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        running += 0.02 * (loss.item() - running)
        if iteration % 100 == 99:
            left = (time.monotonic() - start) / (iteration + 1) * (iterations - iteration - 1)
            print(
                f"{iteration + 1}/{iterations}  loss {running:.4f}  {left:.0f} s left", flush=True
            )
    return average


def feature_statistics(model: ImageClassifier, images: Tensor) -> dict[str, Tensor]:
    """Mean[F] and covariance[F,F] of the real images' features, in float64."""
    with torch.no_grad():
        features = model.features(images).double()
    return {"mean": features.mean(0), "covariance": features.T.cov()}


def main() -> None:
    """Train both models and write them as one diffusers folder."""
    from diffusers import DDIMPipeline, DDIMScheduler

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classifier-epochs", type=int, default=40)
    arguments = parser.parse_args()

    images, labels = load_digits()
    classifier, accuracy = train_classifier(
        images, labels, arguments.seed, arguments.classifier_epochs
    )
    print(f"classifier: accuracy on held-out digits {accuracy:.4f}")
    # Compute the statistics with the shipped weights, which are rounded to half precision.
    classifier.half().float()
    save_classifier(
        classifier, arguments.output / "classifier", feature_statistics(classifier, images)
    )
    unet = train_denoiser(images, labels, arguments.seed, arguments.iterations, arguments.batch)
    pipeline = DDIMPipeline(unet.half(), DDIMScheduler(**SCHEDULER))
    pipeline.save_pretrained(arguments.output, safe_serialization=True)
    classes = {"labels": [str(label) for label in range(CLASSES)], "null_class": NO_CLASS}
    (arguments.output / "classes.json").write_text(
        json.dumps(classes, indent=2) + "\n", encoding="utf-8"
    )
    record = {
        "seed": arguments.seed,
        "iterations": arguments.iterations,
        "batch": arguments.batch,
        "classifier_epochs": arguments.classifier_epochs,
        "classifier_accuracy_held_out": accuracy,
        "torch": torch.__version__,
    }
    (arguments.output / "training.json").write_text(
        json.dumps(record, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
