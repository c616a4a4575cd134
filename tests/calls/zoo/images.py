"""Pipelines around transformers that make images."""

from __future__ import annotations

from typing import Any

from tests.calls.zoo.case import Case
from tests.calls.zoo.encoders import gemma2, glm, qwen3, qwen25_vl, umt5
from tests.calls.zoo.parts import (
    PROMPT,
    TEXT,
    flow,
    flux2_vae,
    guided,
    photograph,
    qwen_vae,
    sana_vae,
    wide_vae,
)
from tests.families.pipelines import flux, sd_3, t5, vae


def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux().components)


def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    tokenizer, encoder = qwen3(causal=True)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=flux2_vae(),
    )


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer, encoder = qwen3()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        transformer=transformer,
        vae=wide_vae(16),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer, encoder = qwen25_vl()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        transformer=transformer,
        vae=qwen_vae(),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    tokenizer, encoder = t5()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        scheduler=flow(),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sana() -> Any:
    from diffusers import SanaPipeline, SanaTransformer2DModel

    tokenizer, encoder = gemma2()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=8,
        sample_size=16,
    )
    return SanaPipeline(
        transformer=transformer,
        vae=sana_vae(),
        scheduler=flow(shift=7.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def sd_35() -> Any:
    """Stable Diffusion 3.5, whose first block has a second attention over the image."""
    from diffusers import SD3Transformer2DModel

    pipeline = sd_3()
    settings = dict(pipeline.transformer.config)
    transformer = SD3Transformer2DModel.from_config(
        settings | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    )
    pipeline.register_modules(transformer=transformer)
    return pipeline


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    tokenizer, encoder = umt5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae(),
        transformer=transformer,
        scheduler=flow(),
    )


def cogview4() -> Any:
    """CogView 4, which calls one of its layers for two inputs."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    tokenizer, encoder = glm()
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(4, 4),
        sample_size=8,
    )
    scheduler = flow(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae(),
        transformer=transformer,
        scheduler=scheduler,
    )


def short(height: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of a call with guidance and texts of T5's maximum length."""
    return guided(height, max_sequence_length=TEXT, **arguments)


CASES = {
    "flux_kontext": Case(
        "Flux Kontext",
        flux_kontext,
        lambda: {
            "prompt": PROMPT,
            "image": photograph(),
            "height": 16,
            "width": 16,
            "max_area": 256,
            "max_sequence_length": TEXT,
            "_auto_resize": False,
        },
    ),
    "flux2_klein": Case(
        "FLUX.2 klein",
        flux2_klein,
        lambda: {
            "prompt": PROMPT,
            "height": 16,
            "width": 16,
            "guidance_scale": 4.0,
            "max_sequence_length": 32,
            "text_encoder_out_layers": (1,),
        },
    ),
    "z_image": Case("Z-Image", z_image, lambda: guided(32, max_sequence_length=32)),
    "qwen_image": Case(
        "Qwen-Image",
        qwen_image,
        lambda: {
            "prompt": PROMPT,
            "negative_prompt": "a cat",
            "true_cfg_scale": 4.0,
            "height": 32,
            "width": 32,
            "max_sequence_length": 64,
        },
    ),
    "chroma": Case("Chroma", chroma, lambda: short(16)),
    "sana": Case(
        "Sana",
        sana,
        lambda: guided(
            32, max_sequence_length=16, complex_human_instruction=None, use_resolution_binning=False
        ),
    ),
    "sd_35": Case("Stable Diffusion 3.5", sd_35, lambda: short(16)),
    "aura_flow": Case("AuraFlow", aura_flow, lambda: short(16)),
    "cogview4": Case("CogView 4", cogview4, lambda: guided(16, max_sequence_length=16)),
}
