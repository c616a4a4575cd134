"""Pipelines whose denoisers take stacked or packed texts."""

from __future__ import annotations

from typing import Any

from tests.calls.zoo.case import Case
from tests.calls.zoo.encoders import gemma2, gemma3, qwen3, qwen25_vl_config, qwen_tokenizer
from tests.calls.zoo.parts import (
    NEGATIVE,
    PROMPT,
    flow,
    flux2_vae,
    guided,
    qwen_vae,
    wide_vae,
)
from tests.families.pipelines import t5


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        "max_position_embeddings": 512,
    }
    image = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [],
        "num_position_embeddings": 16,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=image)
    return tokenizer, Qwen3VLModel(config)


def krea_2() -> Any:
    """Krea 2, whose text is a stack of hidden states of several layers."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    tokenizer, encoder = qwen3_vl()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )


def ernie_image() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    tokenizer, encoder = qwen3()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return ErnieImagePipeline(
        transformer=transformer,
        vae=flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=flow(),
    )


def lumina_2() -> Any:
    """Lumina 2, which cuts its texts to lengths that it reads from their masks."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer, encoder = gemma2()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=wide_vae(4),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def hunyuan_video_15() -> Any:
    """HunyuanVideo 1.5, which sorts the tokens of three conditions by their masks."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel

    tokenizer = qwen_tokenizer()
    encoder = Qwen2_5_VLTextModel(qwen25_vl_config(tokenizer).text_config)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    autoencoder = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16, 16),
        layers_per_block=1,
    )
    return HunyuanVideo15Pipeline(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(shift=7.0),
        text_encoder_2=t5()[1],
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )


def ltx_2_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    options: dict[str, Any] = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **options,
    )


def ltx_2_vae() -> Any:
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        down_block_types=("LTX2VideoDownBlock3D",),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def ltx_2() -> Any:
    """LTX-2: picture and sound in one call."""
    from diffusers import AutoencoderKLLTX2Audio, LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    tokenizer, encoder = gemma3()
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=16,
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * 16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        scheduler=flow(),
        vae=ltx_2_vae(),
        audio_vae=audio_vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        connectors=ltx_2_connectors(),
        transformer=transformer,
        vocoder=vocoder,
    )


CASES = {
    "krea_2": Case("Krea 2", krea_2, lambda: guided(32, max_sequence_length=256)),
    "ernie_image": Case("ERNIE-Image", ernie_image, lambda: guided(16)),
    "hunyuan_video_15": Case(
        "HunyuanVideo 1.5",
        hunyuan_video_15,
        lambda: {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "height": 32,
            "width": 32,
            "num_frames": 5,
        },
        refused="depends on values of another",
    ),
    "ltx_2": Case("LTX-2", ltx_2, lambda: guided(32, num_frames=1, max_sequence_length=16)),
    "lumina_2": Case(
        "Lumina 2",
        lumina_2,
        lambda: guided(32, max_sequence_length=32, system_prompt="a"),
        refused="depends on values of another",
    ),
}
