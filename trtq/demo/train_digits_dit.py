"""Train the digits-dit model that ships with trtq: a diffusion transformer for handwritten digits.

`python -m trtq.demo.train_digits_dit --output DIR` needs only the 1,797 handwritten digits that come
with scikit-learn and the shipped digits model. On the same machine, the same seed gives the same files.

The denoiser is a class-conditional `DiTTransformer2DModel` (DiT, arXiv 2212.09748) with one token per
pixel and a gated feed-forward, which predicts the noise (DDPM, arXiv 2006.11239, eq. 14). After
`TAUGHT_FROM` updates it learns the prediction of the digits model for the same noisy digits, which has
no random part, so the remaining updates are few. Label 10 means "no class": 10 % of the labels are
dropped. `DiTPipeline` needs an autoencoder, here one that returns its input (`identity_vae`). The
classifier is that of the digits model, so the scores of both models are comparable. Finally, outlier
channels are planted (`trtq.demo.outliers`).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.checkpoint.shipped import shipped_model
from trtq.demo.identity_vae import build_identity_vae
from trtq.demo.outliers import channel_ratios, plant_outliers
from trtq.demo.train_digits import CLASSES, LABEL_DROP, NO_CLASS, SCHEDULER, TIMESTEPS, load_digits
from trtq.diffusion.loading import open_pipeline

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "sample_size": 8,
    "patch_size": 1,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": CLASSES,
}
WARM_UP = 200
TAUGHT_FROM = 1200
"""Number of updates after which the transformer learns the digits model's prediction."""


def build_transformer(seed: int) -> Any:
    """Build the untrained transformer, with DiT's initialisation.

    Every block starts as the identity, because its gates start at zero (adaLN-Zero, arXiv 2212.09748,
    section 3.2); so does the prediction.

    Args:
        seed: seed of the weights.
    """
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**TRANSFORMER)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    zeros = [block.norm1.linear for block in model.transformer_blocks]
    for layer in (*zeros, model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    # Labels are dropped once per image; diffusers' training mode would drop them once per block.
    return model.eval()


class Training:
    """State of the training: weights, their moving average, optimiser, random numbers.

    Args:
        model: transformer from `build_transformer`.
        seed: seed of the batches.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.generator = torch.Generator().manual_seed(seed)
        self.updates = 0
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    def save(self, path: Path) -> None:
        """Write the state to a file."""
        state = {name: getattr(self, name).state_dict() for name in _PARTS}
        state |= {"generator": self.generator.get_state(), "updates": self.updates}
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continue from the state in a file."""
        state = torch.load(path, weights_only=True)
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.updates = state["updates"]


_PARTS = ("model", "average", "optimizer")


def train(
    training: Training,
    images: Tensor,
    labels: Tensor,
    *,
    until: int,
    batch: int,
    rate: Callable[[int], float],
    teacher: Any,
    checkpoint: Path | None = None,
) -> None:
    """Minimise the error of the predicted noise, then the distance to the teacher's prediction.

    Args:
        training: state, which is updated.
        images: images of digits, float32[B,1,8,8] in [-1, 1].
        labels: digits, LongTensor[B].
        until: number of updates at the end.
        batch: number of images per update.
        rate: learning rate by number of finished updates.
        teacher: denoiser of the digits model.
        checkpoint: file that receives the state every 100 updates; None: no file.
    """
    from diffusers import DDIMScheduler

    generator, model = training.generator, training.model
    scheduler = DDIMScheduler(**SCHEDULER)
    start, first, running = time.monotonic(), training.updates, None
    for iteration in range(first, until):
        chosen = torch.randint(0, len(images), (batch,), generator=generator)
        # One timestep per stratum has the expectation of independent samples and a lower variance.
        offsets = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (offsets * TIMESTEPS).long().clamp_max(TIMESTEPS - 1)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROP
        noise = torch.randn(images[chosen].shape, generator=generator)
        noisy = scheduler.add_noise(images[chosen], noise, timesteps)
        shown = labels[chosen].masked_fill(dropped, NO_CLASS)
        target = noise
        if iteration >= TAUGHT_FROM:
            with torch.no_grad():
                target = teacher(noisy, timesteps, class_labels=shown).sample
        loss = functional.mse_loss(model(noisy, timesteps, shown).sample, target)
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in training.optimizer.param_groups:
            group["lr"] = rate(iteration)
        training.optimizer.step()
        decay = min(0.998, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for kept, new in zip(training.average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        training.updates = iteration + 1
        running = loss.item() if running is None else running + 0.02 * (loss.item() - running)
        if training.updates % 100 == 0:
            left = (time.monotonic() - start) / (training.updates - first)
            left *= until - training.updates
            print(f"{training.updates}/{until}  loss {running:.4f}  {left:.0f} s left", flush=True)
            if checkpoint is not None:
                training.save(checkpoint)


def learning_rate(peak: float, iterations: int) -> Callable[[int], float]:
    """Warm-up over 200 updates, a constant rate, and a linear decay over the last fifth.

    Args:
        peak: constant learning rate.
        iterations: number of updates in all.
    """
    decay = iterations - decay_start(iterations)
    return lambda update: peak * min(1.0, (update + 1) / WARM_UP, (iterations - update) / decay)


def decay_start(iterations: int) -> int:
    """Number of updates after which the learning rate falls."""
    return iterations - max(1, iterations // 5)


def outlier_summary(pipeline: Any) -> dict[str, float]:
    """Largest over median channel of every block linear's input while ten digits are drawn.

    Args:
        pipeline: the `DiTPipeline`.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    ratios = channel_ratios(
        pipeline.transformer,
        lambda: pipeline(
            list(range(CLASSES)),
            guidance_scale=1.0,
            num_inference_steps=20,
            generator=generator,
            output_type="np",
        ),
    )
    return {name: round(ratio, 1) for name, ratio in ratios.items() if ".emb." not in name}


def write_model(folder: Path, transformer: Any, record: dict[str, Any]) -> None:
    """Plant the outliers and write a diffusers folder with classifier, classes and record.

    Args:
        folder: output folder.
        transformer: trained transformer, which is changed.
        record: settings of the training.
    """
    from diffusers import DDIMScheduler, DiTPipeline

    pipeline = DiTPipeline(transformer, build_identity_vae(), DDIMScheduler(**SCHEDULER))
    record["outliers_trained"] = outlier_summary(pipeline)
    plant_outliers(transformer, record["channels"], record["factor"], record["seed"])
    # The shipped weights are rounded to half precision.
    transformer.half().float()
    record["outliers"] = outlier_summary(pipeline)
    transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    digits = shipped_model("digits")
    assert digits is not None
    shutil.copytree(digits / "classifier", folder / "classifier", dirs_exist_ok=True)
    classes = {"labels": [str(label) for label in range(CLASSES)], "null_class": NO_CLASS}
    for name, content in (("classes.json", classes), ("training.json", record)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the transformer and write it as one diffusers folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--channels", type=int, default=3, help="outlier channels per place")
    parser.add_argument("--factor", type=float, default=32.0, help="factor of these channels")
    parser.add_argument("--checkpoint", type=Path, help="file to continue an interrupted training")
    arguments = parser.parse_args()

    images, labels = load_digits()
    training = Training(build_transformer(arguments.seed), arguments.seed)
    if arguments.checkpoint is not None and arguments.checkpoint.is_file():
        training.load(arguments.checkpoint)
    train(
        training,
        images,
        labels,
        until=arguments.iterations,
        batch=arguments.batch,
        rate=learning_rate(arguments.rate, arguments.iterations),
        teacher=open_pipeline("digits").denoiser,
        checkpoint=arguments.checkpoint,
    )
    record = {k: v for k, v in vars(arguments).items() if k not in ("output", "checkpoint")}
    record["torch"] = torch.__version__
    write_model(arguments.output, training.average, record)


if __name__ == "__main__":
    main()
