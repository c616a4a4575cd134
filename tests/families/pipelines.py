"""Tiny, untrained pipelines of all supported families, with diffusers' classes."""

from __future__ import annotations

from typing import Any

import torch

from trtq.demo.shapes_model import build_text_encoder, build_tokenizer

WORDS = ("a", "red", "blue", "circle", "square")
CLIP_WIDTH = 64


def vae(levels=2):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        shift_factor=0.1,
    )


def vqvae():
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=2,
        sample_size=16,
    )


def clip_with_projection(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    plain = build_text_encoder(tokenizer).config.to_dict()
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(plain))


def t5(width=32):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in WORDS]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=12)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_ff=32, d_kv=8, num_heads=4, num_layers=1
    )
    return tokenizer, T5EncoderModel(config)


def conditional_unet(width, **options):
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | options)


def diffusion(**options):
    """Create a scheduler with Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        **options,
    )


def stable_diffusion(unet, scheduler):
    from diffusers import StableDiffusionPipeline

    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_1():
    """Stable Diffusion 1.x: noise prediction, convolutions around the attention."""
    return stable_diffusion(conditional_unet(CLIP_WIDTH), diffusion())


def sd_2():
    """Stable Diffusion 2.x: velocity prediction, linear projections, Euler steps."""
    from diffusers import EulerDiscreteScheduler

    unet = conditional_unet(CLIP_WIDTH, use_linear_projection=True, attention_head_dim=(2, 4))
    scheduler = EulerDiscreteScheduler.from_config(diffusion(prediction_type="v_prediction").config)
    return stable_diffusion(unet, scheduler)


def sd_xl():
    """Stable Diffusion XL: two text encoders, and the image's size as a condition."""
    from diffusers import StableDiffusionXLPipeline

    tokenizer, second = build_tokenizer(), build_tokenizer()
    unet = conditional_unet(
        2 * CLIP_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=build_text_encoder(tokenizer),
        text_encoder_2=clip_with_projection(second),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=diffusion(),
        add_watermarker=False,
    )


def ldm_vq():
    """Unconditional latent diffusion with a vector-quantised autoencoder."""
    from diffusers import LDMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return LDMPipeline(vqvae=vqvae(), unet=unet, scheduler=diffusion())


def ldm_kl():
    """Text-conditional latent diffusion with a variational autoencoder."""
    from diffusers import LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )
    from transformers import BertTokenizer

    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate((*marks, *WORDS))})
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer),
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=32,
        )
    )
    return LDMTextToImagePipeline(
        vqvae=vae(levels=4),
        bert=bert,
        tokenizer=tokenizer,
        unet=conditional_unet(32),
        scheduler=diffusion(),
    )


def dit():
    """DiT: classes, adaptive norms, a predicted variance."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=10,
    )
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusion())


def pixart():
    """PixArt: a masked T5 text, the image's size as a condition, DPM-Solver."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer, encoder = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=128,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sd_3():
    """Stable Diffusion 3: joint attention, three text encoders, flow matching."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizers = [build_tokenizer(), build_tokenizer()]
    third, t5_encoder = t5(2 * CLIP_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=2 * CLIP_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_with_projection(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_with_projection(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder,
        tokenizer_3=third,
    )


def flux():
    """Flux: packed latents, guidance as an input, timesteps in 0 .. 1 that depend on the size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = build_tokenizer()
    second, t5_encoder = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder,
        tokenizer_2=second,
        transformer=transformer,
    )


PIPELINES = {
    build.__name__: build for build in (sd_1, sd_2, sd_xl, ldm_vq, ldm_kl, dit, pixart, sd_3, flux)
}


def build(name):
    """Build the pipeline with this name, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
