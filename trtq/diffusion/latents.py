"""Initial noise in a pipeline's layout, and decoding of latents to images.

Letters: B images; C, H, W channels, height and width of latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trtq.diffusion.pipeline import LoadedPipeline

__all__ = ["draw_noise", "latent_decoder"]

_SHIFTED = ("StableDiffusion3Pipeline", "FluxPipeline")
_BY_CHANNEL = ("StableDiffusionXLPipeline",)
"""Pipelines that normalise latents by channel; others ignore their autoencoder's configuration."""


def draw_noise(loaded: LoadedPipeline, generator: torch.Generator) -> Tensor:
    """Standard normal noise of one image, `[1, ...]`, in the pipeline's layout and order.

    Args:
        loaded: loaded pipeline.
        generator: random generator of the noise.
    """
    if not loaded.packed:
        return torch.randn((1, *loaded.sample_shape), generator=generator)
    channels = loaded.sample_shape[-1] // 4
    height, width = loaded.latent_size
    noise = torch.randn((1, channels, height, width), generator=generator)
    packed: Tensor = loaded.pipeline._pack_latents(noise, 1, channels, height, width)
    return packed


def latent_decoder(loaded: LoadedPipeline) -> Callable[[Tensor], Tensor]:
    """A function from clean samples `[B, ...]` to images in [-1, 1], as in the pipeline itself."""
    pipeline = loaded.pipeline
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if autoencoder is None:
        return lambda x: x
    restore = _restorer(type(pipeline).__name__, autoencoder.config)

    def decode(x: Tensor) -> Tensor:
        if loaded.packed:
            x = pipeline._unpack_latents(x, *loaded.image_size, pipeline.vae_scale_factor)
        image: Tensor = autoencoder.decode(restore(x), return_dict=False)[0]
        return image

    return decode


def _restorer(pipeline_class: str, config: dict[str, object]) -> Callable[[Tensor], Tensor]:
    """A function that reverts the normalisation of latents x[B,C,H,W]."""

    def number(name: str, default: float) -> float:
        value = config.get(name)
        return default if value is None else float(value)  # type: ignore[arg-type]

    scale = number("scaling_factor", 1.0)
    by_channel = [config.get(name) for name in ("latents_mean", "latents_std")]
    if pipeline_class in _BY_CHANNEL and None not in by_channel:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in by_channel)
        return lambda x: x * std / scale + mean
    shift = number("shift_factor", 0.0) if pipeline_class in _SHIFTED else 0.0
    return lambda x: x / scale + shift
