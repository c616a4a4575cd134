"""A tiny inpainting pipeline: a UNet with nine channels, which trtq knows through its call only."""

from __future__ import annotations

import torch
from PIL import Image

from tests.families.pipelines import CLIP_WIDTH, conditional_unet, diffusion, vae
from trtq.demo.shapes_model import build_text_encoder, build_tokenizer

RECIPE = {"method": "minmax", "bits": "w4a8", "steps": 2, "calibration": {"images": 1}}


def inpainting():
    from diffusers import StableDiffusionInpaintPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        return StableDiffusionInpaintPipeline(
            vae=vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=conditional_unet(CLIP_WIDTH, in_channels=9),
            scheduler=diffusion(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def arguments(colour=(200, 30, 30)):
    return {
        "prompt": "a red circle",
        "image": Image.new("RGB", (16, 16), colour),
        "mask_image": Image.new("L", (16, 16), 255),
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
    }
