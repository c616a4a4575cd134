"""Train the text-to-image model that ships with trtq, and the classifier for its evaluation.

`python -m trtq.demo.train_shapes --output DIR` renders images with captions (`trtq.demo.shapes`) and
needs no data. The result is a `StableDiffusionPipeline`: byte-pair tokenizer, CLIP text encoder, VAE,
and a `UNet2DConditionModel` with cross-attention that predicts the noise of latents (DDPM, arXiv
2006.11239, eq. 14). 10 % of the captions are dropped, which enables classifier-free guidance (arXiv
2207.12598). On the same machine, the same seed gives the same files.

Each part is written as soon as it is trained; existing parts are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq.demo.shapes import ATTRIBUTES, SIZE, Scene, draw_scenes, random_scene
from trtq.demo.shapes_model import (
    SCHEDULER,
    TIMESTEPS,
    UNET,
    VAE,
    build_text_encoder,
    build_tokenizer,
    tokenize,
)
from trtq.evaluation.classifier import ImageClassifier, load_classifier, save_classifier

CAPTION_DROP = 0.1
GUIDANCE = 3.0


def scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """Choose `count` random scenes."""
    return [random_scene(generator) for _ in range(count)]


def _train(
    name: str,
    parameters: list[nn.Parameter],
    iterations: int,
    rate: float,
    loss_of: Callable[[], Tensor],
    after: Callable[[int], None] | None = None,
) -> None:
    """Optimise with AdamW and a one-cycle learning rate; print running loss and remaining time."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=iterations, pct_start=0.1
    )
    start = time.monotonic()
    running: float | None = None
    for iteration in range(iterations):
        loss = loss_of()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after is not None:
            after(iteration)
        running = loss.item() if running is None else running + 0.02 * (loss.item() - running)
        if iteration % 100 == 99:
            left = (time.monotonic() - start) / (iteration + 1) * (iterations - iteration - 1)
            print(f"{name} {iteration + 1}/{iterations}  loss {running:.5f}  {left:.0f} s left")


def train_classifier(folder: Path, seed: int, iterations: int, batch: int) -> float:
    """Train the classifier on images that do not repeat; return its accuracy on new images.

    An image counts as correct only if every attribute is correct.

    Args:
        folder: output folder of the classifier.
        seed: seed of weights and scenes.
        iterations: number of updates.
        batch: number of images per update.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ImageClassifier(channels=3, size=SIZE, heads=ATTRIBUTES, width=16, features=64)

    def loss_of() -> Tensor:
        shown = scenes(batch, generator)
        pictures = draw_scenes(shown, generator)
        # Generated images are noisier than rendered images.
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        answers = model(pictures)
        return torch.stack(
            [
                functional.cross_entropy(logits, _labels(shown, name), label_smoothing=0.02)
                for name, logits in answers.items()
            ]
        ).sum()

    _train("classifier", list(model.parameters()), iterations, 3e-3, loss_of)
    # Compute the statistics with the shipped weights, which are rounded to half precision.
    model.half().float().eval()
    with torch.no_grad():
        shown = scenes(4000, generator)
        pictures = draw_scenes(shown, generator)
        answers = model(pictures)
        correct = torch.stack([a.argmax(1) == _labels(shown, n) for n, a in answers.items()]).all(0)
        features = model.features(pictures).double()
    save_classifier(model, folder, {"mean": features.mean(0), "covariance": features.T.cov()})
    return float(correct.float().mean())


def _labels(shown: list[Scene], name: str) -> Tensor:
    return torch.tensor([scene.labels[name] for scene in shown])


def train_vae(seed: int, iterations: int, batch: int) -> Any:
    """Train the VAE with squared error and a small KL term on the latents.

    Args:
        seed: seed of weights and scenes.
        iterations: number of updates.
        batch: number of images per update.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = AutoencoderKL(**VAE)

    def loss_of() -> Tensor:
        pictures = draw_scenes(scenes(batch, generator), generator)
        posterior = model.encode(pictures).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        error = functional.mse_loss(decoded, pictures)
        divergence: Tensor = 1e-5 * posterior.kl().mean() / 16
        return error + divergence

    _train("vae", list(model.parameters()), iterations, 4e-3, loss_of)
    model = model.half().float().eval()
    with torch.no_grad():
        pictures = draw_scenes(scenes(500, generator), generator)
        latents = model.encode(pictures).latent_dist.mode()
        error = functional.mse_loss(model.decode(latents).sample, pictures).item()
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    print(f"vae: squared error {error:.5f}, scaling factor {model.config.scaling_factor:.4f}")
    return model


@torch.no_grad()
def latent_set(vae: Any, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Scaled latents[count,4,8,8] of new images, and their captions.

    Args:
        vae: trained VAE.
        count: number of images.
        generator: random generator of the scenes.
    """
    latents, captions = [], []
    for first in range(0, count, 500):
        shown = scenes(min(500, count - first), generator)
        mode = vae.encode(draw_scenes(shown, generator)).latent_dist.mode()
        latents.append(mode * vae.config.scaling_factor)
        captions += [scene.caption for scene in shown]
    return torch.cat(latents), captions


def train_denoiser(
    vae: Any, tokenizer: Any, seed: int, iterations: int, batch: int, pictures: int
) -> tuple[Any, Any]:
    """Train UNet and text encoder together; return the moving averages of their weights.

    Args:
        vae: trained VAE.
        tokenizer: tokenizer of the captions.
        seed: seed of weights and batches.
        iterations: number of updates.
        batch: number of latents per update.
        pictures: number of training images.

    Returns:
        UNet and text encoder.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    latents, captions = latent_set(vae, pictures, generator)
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    both = nn.ModuleDict(
        {"unet": UNet2DConditionModel(**UNET), "text": build_text_encoder(tokenizer)}
    )
    average = copy.deepcopy(both).requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULER)

    def loss_of() -> Tensor:
        chosen = torch.randint(0, len(latents), (batch,), generator=generator)
        # One timestep per stratum has the expectation of independent samples and a lower variance.
        offsets = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (offsets * TIMESTEPS).long().clamp_max(TIMESTEPS - 1)
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROP
        noise = torch.randn(latents[chosen].shape, generator=generator)
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        states = both["text"](torch.where(dropped[:, None], empty, ids[chosen])).last_hidden_state
        predicted = both["unet"](noisy, timesteps, states).sample
        return functional.mse_loss(predicted, noise)

    def after(iteration: int) -> None:
        decay = min(0.998, (1 + iteration) / (10 + iteration))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), both.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)

    parameters = [p for p in both.parameters() if p.requires_grad]
    _train("denoiser", parameters, iterations, 2e-3, loss_of, after)
    return average["unet"], average["text"]


def write_prompts(path: Path, seed: int) -> None:
    """Write calibration prompts, and evaluation prompts with the attributes of the images."""
    generator = torch.Generator().manual_seed(seed + 3)
    evaluated = scenes(1000, generator)
    prompts = {
        "guidance": GUIDANCE,
        "calibration": [scene.caption for scene in scenes(256, generator)],
        "evaluation": [{"prompt": scene.caption, "labels": scene.labels} for scene in evaluated],
    }
    path.write_text(json.dumps(prompts) + "\n", encoding="utf-8")


def main() -> None:
    """Train the missing parts and write all parts as one diffusers folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-iterations", type=int, default=1500)
    parser.add_argument("--vae-iterations", type=int, default=2000)
    parser.add_argument("--vae-batch", type=int, default=24)
    parser.add_argument("--iterations", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=30000)
    arguments = parser.parse_args()

    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    record = {key: value for key, value in vars(arguments).items() if key != "output"}
    if not (folder / "classifier").is_dir():
        accuracy = train_classifier(
            folder / "classifier", arguments.seed, arguments.classifier_iterations, 64
        )
        print(f"classifier: every attribute correct in {accuracy:.4f} of new pictures")
    load_classifier(folder / "classifier")
    if not (folder / "vae").is_dir():
        train_vae(
            arguments.seed, arguments.vae_iterations, arguments.vae_batch
        ).half().save_pretrained(folder / "vae")
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # omit the local path
    tokenizer = build_tokenizer()
    unet, text_encoder = train_denoiser(
        vae,
        tokenizer,
        arguments.seed,
        arguments.iterations,
        arguments.batch,
        arguments.pictures,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_prompts(folder / "prompts.json", arguments.seed)
    record["torch"] = torch.__version__
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
