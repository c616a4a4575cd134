"""Pipelines that make video or sound."""

from __future__ import annotations

from typing import Any

from tests.calls.zoo.case import Case
from tests.calls.zoo.encoders import llama, umt5
from tests.calls.zoo.parts import PROMPT, TEXT, flow, guided, wan_vae
from tests.families.pipelines import t5


def wan_transformer(**options: Any) -> Any:
    from diffusers import WanTransformer3DModel

    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**settings | options)


def wan(second: bool = False) -> Any:
    """Wan; its second transformer takes the steps with less noise."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    tokenizer, encoder = umt5()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=wan_vae(),
        scheduler=scheduler,
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if second else None,
        boundary_ratio=0.875 if second else None,
    )


def wan_21() -> Any:
    return wan()


def wan_22() -> Any:
    return wan(second=True)


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer, encoder = t5()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    autoencoder.use_framewise_encoding = False
    autoencoder.use_framewise_decoding = False
    return LTXPipeline(
        scheduler=flow(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def small_clip(width: int) -> tuple[Any, Any]:
    """A CLIP text encoder for the 77 tokens that HunyuanVideo asks for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.calls.zoo.encoders import byte_entries

    letters = byte_entries()
    marks = ["<|startoftext|>", "<|endoftext|>"]
    entries = [*letters, *(letter + "</w>" for letter in letters), *marks]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=4,
        num_hidden_layers=1,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, CLIPTextModel(config)


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    tokenizer, encoder = llama()
    second, clip = small_clip(8)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return HunyuanVideoPipeline(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=hunyuan_vae(),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=second,
    )


def stable_audio() -> Any:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    tokenizer, encoder = t5()
    transformer = StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        num_attention_heads=4,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
    )
    scheduler = EDMDPMSolverMultistepScheduler(
        solver_order=2,
        prediction_type="v_prediction",
        sigma_data=1.0,
        sigma_schedule="exponential",
    )
    return StableAudioPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        projection_model=projection,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
    )


def video(height: int, **arguments: Any) -> dict[str, Any]:
    return guided(height, num_frames=9, max_sequence_length=TEXT, **arguments)


CASES = {
    "wan_21": Case("Wan 2.1", wan_21, lambda: video(16)),
    "wan_22": Case("Wan 2.2", wan_22, lambda: video(16)),
    "ltx": Case("LTX-Video", ltx, lambda: video(32), fast=True),
    "hunyuan_video": Case(
        "HunyuanVideo",
        hunyuan_video,
        lambda: {
            "prompt": PROMPT,
            "prompt_template": {"template": "{}", "crop_start": 0},
            "guidance_scale": 4.5,
            "height": 16,
            "width": 16,
            "num_frames": 9,
            "max_sequence_length": 16,
        },
    ),
    "stable_audio": Case(
        "Stable Audio", stable_audio, lambda: {"prompt": PROMPT, "guidance_scale": 6.0}
    ),
}
