"""Initial noise in a pipeline's layout, and decoding of latents to images.

Letters: B images; C, H, W channels, height and width of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError

__all__ = ["check_noise", "draw_noise", "latent_decoder"]


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


def check_noise(loaded: LoadedPipeline) -> None:
    """Raise unless the pipeline's own call starts from the same noise as `draw_noise`.

    Raises:
        UsageError: the noise differs.
        ArtefactError: the pipeline cannot be called.
    """
    passed = loaded.own_call.first(loaded.image_size).noise
    drawn = draw_noise(loaded, torch.Generator().manual_seed(0))
    # A call without an argument for the size makes images of the model's own size.
    comparable = passed is None or passed.shape == drawn.shape or not loaded.resized
    if comparable and (passed is None or not torch.equal(passed.cpu(), drawn)):
        kind = type(loaded.pipeline).__name__
        raise UsageError(f"{kind} starts from noise that trtq does not know")


def latent_decoder(loaded: LoadedPipeline) -> Callable[[Tensor], Tensor]:
    """A function from clean samples `[B, ...]` to images in [-1, 1], as in the pipeline itself.

    Raises:
        UsageError: the pipeline normalises its latents in an unknown way.
        ArtefactError: the pipeline cannot be called.
    """
    pipeline = loaded.pipeline
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if autoencoder is None:
        return lambda x: x

    def unpacked(x: Tensor) -> Tensor:
        if not loaded.packed:
            return x
        latents: Tensor = pipeline._unpack_latents(x, *loaded.image_size, pipeline.vae_scale_factor)
        return latents

    call = loaded.own_call.first(loaded.image_size)
    if call.following is None or call.decoded is None:
        raise UsageError(f"{type(pipeline).__name__} does not decode its latents with its vae")
    latents, expected = unpacked(call.following), call.decoded
    fitting = [f for f in _restorers(autoencoder.config) if torch.allclose(f(latents), expected)]
    if not fitting:
        raise UsageError(
            f"{type(pipeline).__name__} normalises its latents in a way that trtq does not know"
        )

    def decode(x: Tensor) -> Tensor:
        # A pipeline whose graphs run on a GPU lies there; the server's samples are arrays of the host.
        on_device = unpacked(x).to(latents.device)
        image: Tensor = autoencoder.decode(fitting[0](on_device), return_dict=False)[0]
        return image.cpu()

    return decode


def _restorers(config: Mapping[str, Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Functions that revert the normalisation of latents x[B,C,H,W], as pipelines do."""
    scale = float(config.get("scaling_factor") or 1.0)
    yield lambda x: x / scale
    if config.get("shift_factor") is not None:
        shift = float(config["shift_factor"])
        yield lambda x: x / scale + shift
    by_channel = [config.get(name) for name in ("latents_mean", "latents_std")]
    if None not in by_channel:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in by_channel)
        yield lambda x: x * std.to(x.device) / scale + mean.to(x.device)
