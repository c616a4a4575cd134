"""Between noise, latents and images: what pipelines do before their first step and after their last.

Letters: C, H, W of latents, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trtq.diffusion.pipeline import LoadedPipeline

__all__ = ["draw_noise", "latent_decoder"]

_SHIFTED = ("StableDiffusion3Pipeline", "FluxPipeline")
_BY_CHANNEL = ("StableDiffusionXLPipeline",)
"""Others have these numbers in their autoencoder's configuration, too, and do not use them."""


def draw_noise(source: LoadedPipeline, generator: torch.Generator) -> Tensor:
    """Standard normal noise for one image, in the order in which its pipeline draws it, `[1, ...]`."""
    if not source.packed:
        return torch.randn((1, *source.sample_shape), generator=generator)
    channels = source.sample_shape[-1] // 4
    height, width = source.latent_size
    noise = torch.randn((1, channels, height, width), generator=generator)
    packed: Tensor = source.pipeline._pack_latents(noise, 1, channels, height, width)
    return packed


def latent_decoder(source: LoadedPipeline) -> Callable[[Tensor], Tensor]:
    """What turns clean samples `[B, ...]` into images in [-1, 1], as the pipeline itself does."""
    pipeline = source.pipeline
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if autoencoder is None:
        return lambda x: x
    restore = _restorer(type(pipeline).__name__, autoencoder.config)

    def decode(x: Tensor) -> Tensor:
        if source.packed:
            x = pipeline._unpack_latents(x, *source.image_size, pipeline.vae_scale_factor)
        image: Tensor = autoencoder.decode(restore(x), return_dict=False)[0]
        return image

    return decode


def _restorer(pipeline_class: str, config: dict[str, object]) -> Callable[[Tensor], Tensor]:
    """What undoes the normalisation of latents x[B,C,H,W]."""

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
