"""Guess the base model of a LoRA from its layers, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def base_model_of(names: Iterable[str], inputs: Mapping[str, int]) -> str | None:
    """The probable base model of a LoRA; None if its layers match no known model.

    Args:
        names: names of the layers in the file.
        inputs: number of input channels of each layer, by name.
    """
    text = "\n".join(names)
    widths = {
        width
        for name, width in inputs.items()
        if re.search(r"attn2[._](processor[._])?to_[kv]$", name)
    }
    unet = re.search(
        r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block", text
    )
    if unet and ("text_encoder_2" in text or "lora_te2_" in text or 2048 in widths):
        return "Stable Diffusion XL"
    if unet and 768 in widths:
        return "Stable Diffusion 1.x"
    if unet and 1024 in widths:
        return "Stable Diffusion 2.x"
    for pattern, model in (
        (r"joint_blocks", "Stable Diffusion 3"),
        (r"individual_token_refiner", "HunyuanVideo"),
        (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
        (r"blocks[._]\d+[._](self|cross)_attn[._][qkvo]", "Wan"),
        (
            r"transformer_blocks[._]\d+[._]attn[._]add_q_proj",
            "a model with joint attention (Flux, SD 3)",
        ),
        (r"layers[._]\d+[._]attention", "Lumina 2 or Z-Image"),
        (r"input_blocks|middle_block|output_blocks", "Stable Diffusion XL"),
        (r"down_blocks|up_blocks|mid_block", "a Stable Diffusion with a UNet"),
        (r"transformer_blocks[._]\d+", "a diffusion transformer"),
        (r"^(lora_te|text_encoder)", "a text encoder"),
    ):
        if re.search(pattern, text, re.MULTILINE):
            return model
    return None
