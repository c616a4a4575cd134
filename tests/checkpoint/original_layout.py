"""Pipelines written as one file in the original layout, the inverse of diffusers' conversion."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet(model):
    """The tensors of a `UNet2DConditionModel` under the names of latent-diffusion."""
    layers = model.config.layers_per_block

    def block(match):
        kind, i, part, j = match[1], int(match[2]), match[3], int(match[4])
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        if part == "upsamplers":
            attends = hasattr(model.up_blocks[i], "attentions")
            return f"output_blocks.{(layers + 1) * i + layers}.{2 if attends else 1}.conv"
        place = 0 if part == "resnets" else 1
        if kind == "down":
            return f"input_blocks.{(layers + 1) * i + j + 1}.{place}"
        return f"output_blocks.{(layers + 1) * i + j}.{place}"

    def middle(match):
        return f"middle_block.{2 * int(match[2]) if match[1] == 'resnets' else 1}"

    renamed = {}
    for name, tensor in model.state_dict().items():
        for new, old in RESNET.items() if ".resnets." in name else ():
            name = name.replace(f".{new}.", f".{old}.")
        for new, old in ENDS.items():
            name = re.sub(rf"^{re.escape(new)}\.", f"{old}.", name)
        name = re.sub(
            r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\.conv)?(?=\.)",
            lambda m: block(m) if m[3].endswith("samplers") else block(m) + (m[5] or ""),
            name,
        )
        renamed[re.sub(r"^mid_block\.(resnets|attentions)\.(\d+)", middle, name)] = tensor
    return renamed


def vae(model):
    """The tensors of an `AutoencoderKL` under the names of latent-diffusion."""
    levels = len(model.config.block_out_channels)
    renamed = {}
    for name, tensor in model.state_dict().items():
        if ".attentions." in name:
            for new, old in ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        for i in range(levels):
            up = f"up.{levels - 1 - i}"
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"{up}.upsample")
            name = name.replace(f"up_blocks.{i}.resnets.", f"{up}.block.")
        renamed[name] = tensor
    return renamed


def clip(model):
    """The tensors of a CLIP text encoder under the names of transformers 4."""
    return {
        name
        if name.startswith(("text_model.", "text_projection"))
        else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }


def open_clip(model):
    """The tensors of a CLIP text encoder with projection under the names of OpenCLIP."""
    renamed = {"logit_scale": torch.tensor(4.6)}
    state = {name.removeprefix("text_model."): t for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
            place = name.replace("self_attn.q_proj.", "attn.in_proj_")
            renamed[place.replace("encoder.layers.", "transformer.resblocks.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for new, old in OPEN_CLIP.items():
                name = name.replace(new, old)
            renamed[name] = tensor
    return renamed


def tensors_of(pipeline):
    """The tensors of a Stable Diffusion 1.x or XL pipeline in the original layout."""
    second = getattr(pipeline, "text_encoder_2", None)
    first = "cond_stage_model." if second is None else "conditioner.embedders.0."
    parts = {
        "model.diffusion_model.": unet(pipeline.unet),
        "first_stage_model.": vae(pipeline.vae),
        f"{first}transformer.": clip(pipeline.text_encoder),
    }
    if second is not None:
        parts["conditioner.embedders.1.model."] = open_clip(second)
    tensors = {p + name: t for p, state in parts.items() for name, t in state.items()}
    position = f"{first}transformer.text_model.embeddings.position_ids"
    return tensors | {position: torch.arange(16)[None], "model_ema.decay": torch.ones(())}


def write(pipeline, file, change=None):
    """Write a pipeline as one file; `change` edits the dict of its tensors first."""
    tensors = {
        name: tensor.detach().clone().contiguous() for name, tensor in tensors_of(pipeline).items()
    }
    if change is not None:
        change(tensors)
    save_file(tensors, file)
