"""Pipelines around the UNet of Stable Diffusion: editing, control, adapters, few steps."""

from __future__ import annotations

from typing import Any

import torch

from tests.calls.zoo.case import Case
from tests.calls.zoo.parts import (
    CLIP,
    PROMPT,
    UNCHECKED,
    guided,
    photograph,
    picture,
    stable_diffusion_parts,
)
from tests.families.pipelines import conditional_unet, diffusion, sd_xl, vae
from trtq.demo.shapes_model import build_text_encoder, build_tokenizer


def img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**stable_diffusion_parts(), **UNCHECKED)


def inpainting() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    # One block down and one up: `make test` runs this one.
    parts = stable_diffusion_parts(
        in_channels=9,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return StableDiffusionInpaintPipeline(**parts, **UNCHECKED)


def instruct_pix2pix() -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    parts = stable_diffusion_parts(in_channels=8)
    return StableDiffusionInstructPix2PixPipeline(**parts, **UNCHECKED)


def controlnet() -> Any:
    """ControlNet, whose zero convolutions get weights so that its output counts."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    control = ControlNetModel(
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=CLIP,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    parts = stable_diffusion_parts()
    return StableDiffusionControlNetPipeline(**parts, controlnet=control, **UNCHECKED)


def ip_adapter() -> Any:
    """Stable Diffusion whose UNet also attends to an image."""
    from diffusers import StableDiffusionPipeline
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    image = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=32,
        patch_size=16,
    )
    pipeline = StableDiffusionPipeline(
        **stable_diffusion_parts(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=CLIPVisionModelWithProjection(image),
        requires_safety_checker=False,
    )
    unet, attention = pipeline.unet, {}
    cross = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(cross):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for matrix in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * index + 1}.{matrix}.weight"] = 0.1 * torch.randn(width, CLIP)
    projection = {
        "proj.weight": 0.1 * torch.randn(4 * CLIP, 32),
        "proj.bias": torch.zeros(4 * CLIP),
        "norm.weight": torch.ones(CLIP),
        "norm.bias": torch.zeros(CLIP),
    }
    weights = [{"image_proj": projection, "ip_adapter": attention}]
    unet._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)
    return pipeline


def perturbed_attention() -> Any:
    """Stable Diffusion whose pipeline sets attention processors during its call."""
    from diffusers import StableDiffusionPAGPipeline

    parts = stable_diffusion_parts()
    return StableDiffusionPAGPipeline(**parts, **UNCHECKED, pag_applied_layers=["mid"])


def latent_consistency() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = stable_diffusion_parts(time_cond_proj_dim=8)
    parts["scheduler"] = LCMScheduler.from_config(diffusion().config)
    return LatentConsistencyModelPipeline(**parts, **UNCHECKED)


def playground() -> Any:
    """Stable Diffusion XL with the noise levels of EDM, as Playground 2.5 has them."""
    from diffusers import EDMDPMSolverMultistepScheduler

    pipeline = sd_xl()
    pipeline.register_modules(scheduler=EDMDPMSolverMultistepScheduler())
    pipeline.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
    return pipeline


def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    tokenizer = build_tokenizer()
    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    return AnimateDiffPipeline(
        vae=vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=conditional_unet(CLIP),
        motion_adapter=motion,
        scheduler=diffusion(),
    )


def at_size(**arguments: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "height": 16, "width": 16} | arguments


CASES = {
    "sd_img2img": Case(
        "Stable Diffusion, image to image",
        img2img,
        lambda: {"prompt": PROMPT, "image": picture(), "strength": 0.99},
    ),
    "sd_inpainting": Case(
        "Stable Diffusion, inpainting",
        inpainting,
        lambda: at_size(image=picture(), mask_image=torch.ones(1, 1, 16, 16)),
        fast=True,
    ),
    "instruct_pix2pix": Case(
        "InstructPix2Pix",
        instruct_pix2pix,
        lambda: {"prompt": PROMPT, "image": picture(), "image_guidance_scale": 1.5},
    ),
    "sd_controlnet": Case(
        "Stable Diffusion, ControlNet", controlnet, lambda: at_size(image=picture())
    ),
    "sd_ip_adapter": Case(
        "Stable Diffusion, IP-Adapter",
        ip_adapter,
        lambda: at_size(ip_adapter_image=photograph(32)),
    ),
    "sd_pag": Case(
        "Stable Diffusion, perturbed-attention guidance",
        perturbed_attention,
        lambda: at_size(guidance_scale=4.0, pag_scale=2.0),
    ),
    "lcm": Case("Latent consistency model", latent_consistency, at_size),
    "playground": Case(
        "SDXL with EDM (Playground 2.5)", playground, lambda: at_size(guidance_scale=3.0)
    ),
    "animatediff": Case("AnimateDiff", animatediff, lambda: guided(16, num_frames=4)),
}
