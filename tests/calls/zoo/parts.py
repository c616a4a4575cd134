"""Tokenizers, text encoders, autoencoders and schedulers that several pipelines share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families.pipelines import conditional_unet, diffusion, vae
from trtq.demo.shapes_model import build_text_encoder, build_tokenizer

PROMPT = "a red circle"
NEGATIVE = "a blue square"
TEXT = 12
"""Maximum number of tokens of the T5 tokenizer in `tests.families.pipelines`."""
CLIP = 64
"""Width of the CLIP text encoder."""


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def guided(height: int, width: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Arguments of a call with guidance by a negative prompt."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": 4.0,
        "height": height,
        "width": width or height,
    } | arguments


def picture(seed: int = 0, channels: int = 3, side: int = 16) -> Tensor:
    """An image of random values between 0 and 1, Tensor[1, channels, side, side]."""
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(seed))


def photograph(side: int = 16) -> Any:
    """An image of PIL of random values."""
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor.pt_to_numpy(picture(side=side))
    return VaeImageProcessor.numpy_to_pil(pixels)[0]


def stable_diffusion_parts(**unet_options: Any) -> dict[str, Any]:
    """Components of a pipeline around Stable Diffusion's UNet, without the safety checker."""
    tokenizer = build_tokenizer()
    return {
        "vae": vae(),
        "text_encoder": build_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": conditional_unet(CLIP, **unet_options),
        "scheduler": diffusion(),
    }


UNCHECKED: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def wide_vae(channels: int) -> Any:
    """An autoencoder with more channels of latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        shift_factor=0.1,
    )


def wan_vae(channels: int = 16) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def qwen_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sana_vae() -> Any:
    from diffusers import AutoencoderDC

    blocks = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
