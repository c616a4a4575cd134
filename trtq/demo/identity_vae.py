"""An autoencoder of diffusers that returns its input, for a transformer that works on pixels.

`DiTPipeline` decodes latents with an `AutoencoderKL`. Here the latents are the pixels themselves. Both
halves hold the channels (x, -x, K, -K): their mean is 0 and their deviation nearly the constant
K / sqrt(2), so the group normalisation is a multiplication, and SiLU(x) - SiLU(-x) = x undoes the
activation. The relative error is x^2 / (2 K^2) at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["VAE", "build_identity_vae"]

VAE: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "latent_channels": 1,
    "norm_num_groups": 1,
    "sample_size": 8,
    "scaling_factor": 1.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
CONSTANT = 32.0
LOG_VARIANCE = -30.0
"""Logarithm of the latents' variance: the encoder adds no noise."""


@torch.no_grad()
def build_identity_vae() -> Any:
    """Build the autoencoder: pixels[B,1,8,8] -> latents[B,1,8,8] -> the same pixels, in float32."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            # Residual blocks whose convolutions are zero return their input.
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight[:2, 0, 1, 1] = torch.tensor([1.0, -1.0])
        half.conv_in.bias[2:] = torch.tensor([CONSTANT, -CONSTANT])
        half.conv_norm_out.weight.fill_(CONSTANT / 2**0.5)
        half.conv_out.weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0])
    vae.encoder.conv_out.bias[1] = LOG_VARIANCE
    return vae.eval()
