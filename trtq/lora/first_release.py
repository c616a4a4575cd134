"""Names of layers in the first releases of their models, by path in diffusers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["first_release_names", "flat"]

# Name in the first release -> path in diffusers. `{}` is the number of a block; the layers in brackets
# are concatenated in one matrix; `~` swaps shift and scale.
_FLUX = {
    "double_blocks.{}.img_attn.qkv": "transformer_blocks.{}.attn.(to_q to_k to_v)",
    "double_blocks.{}.txt_attn.qkv": "transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.(attn.to_q attn.to_k attn.to_v proj_mlp)",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
    # Names of XLabs' attention processors.
    "double_blocks.{}.qkv1": "transformer_blocks.{}.attn.(to_q to_k to_v)",
    "double_blocks.{}.qkv2": "transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)",
    "double_blocks.{}.proj1": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.proj2": "transformer_blocks.{}.attn.to_add_out",
    "single_blocks.{}.qkv": "single_transformer_blocks.{}.attn.(to_q to_k to_v)",
    "single_blocks.{}.proj": "single_transformer_blocks.{}.proj_out",
}


_SD3 = {
    "joint_blocks.{}.x_block.attn.qkv": "transformer_blocks.{}.attn.(to_q to_k to_v)",
    "joint_blocks.{}.x_block.attn2.qkv": "transformer_blocks.{}.attn2.(to_q to_k to_v)",
    "joint_blocks.{}.context_block.attn.qkv": (
        "transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)"
    ),
    "joint_blocks.{}.x_block.attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "joint_blocks.{}.x_block.attn2.proj": "transformer_blocks.{}.attn2.to_out.0",
    "joint_blocks.{}.context_block.attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}.norm1_context.linear",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}


_WAN = {
    f"blocks.{{}}.{theirs}.{letter}": f"blocks.{{}}.{ours}.{name}"
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for letter, name in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("k_img", "add_k_proj"),
        ("v_img", "add_v_proj"),
    )
} | {
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}


_HUNYUAN_VIDEO = {
    "double_blocks.{}.img_attn_qkv": "transformer_blocks.{}.attn.(to_q to_k to_v)",
    "double_blocks.{}.txt_attn_qkv": "transformer_blocks.{}.attn.(add_q_proj add_k_proj add_v_proj)",
    "double_blocks.{}.img_attn_proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn_proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "double_blocks.{}.img_mod.linear": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.linear": "transformer_blocks.{}.norm1_context.linear",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.(attn.to_q attn.to_k attn.to_v proj_mlp)",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
} | {
    f"txt_in.individual_token_refiner.blocks.{{}}.{theirs}": (
        f"context_embedder.token_refiner.refiner_blocks.{{}}.{ours}"
    )
    for theirs, ours in (
        ("self_attn_qkv", "attn.(to_q to_k to_v)"),
        ("self_attn_proj", "attn.to_out.0"),
        ("mlp.fc1", "ff.net.0.proj"),
        ("mlp.fc2", "ff.net.2"),
        ("adaLN_modulation.1", "norm_out.linear"),
    )
}


_LUMINA2 = {
    f"{stack}.{{}}.{theirs}": f"{stack}.{{}}.{ours}"
    for stack in ("layers", "noise_refiner", "context_refiner")
    for theirs, ours in (
        ("attention.qkv", "attn.(to_q to_k to_v)"),
        ("attention.out", "attn.to_out.0"),
        ("feed_forward.w1", "feed_forward.linear_1"),
        ("feed_forward.w2", "feed_forward.linear_2"),
        ("feed_forward.w3", "feed_forward.linear_3"),
        ("adaLN_modulation.1", "norm1.linear"),
    )
}


_Z_IMAGE = {
    f"{stack}.{{}}.attention.qkv": f"{stack}.{{}}.attention.(to_q to_k to_v)"
    for stack in ("layers", "noise_refiner", "context_refiner")
}


_FIRST_RELEASE = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "Lumina2Transformer2DModel": _LUMINA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
}


_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def flat(path: str) -> str:
    """A path with underscores in place of dots."""
    return path.replace(".", "_")


def _blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Parts of a UNet: name in the first release of Stable Diffusion, and path in diffusers."""
    number = 1
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", None) or ()
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}"
            if j < len(attentions):
                yield f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}"
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{number}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None) or ()
        last = len(getattr(block, "resnets", ())) - 1
        for j in range(last + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{i}.resnets.{j}"
            if j < len(attentions):
                yield f"output_blocks.{number}.1", f"up_blocks.{i}.attentions.{j}"
            if j == last and getattr(block, "upsamplers", None):
                index = 2 if j < len(attentions) else 1
                yield f"output_blocks.{number}.{index}", f"up_blocks.{i}.upsamplers.0"
            number += 1


def _unet_names(unet: Any, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Layers of a UNet: name in the first release of Stable Diffusion, and path in diffusers."""
    parts = {path: name for name, path in _blocks(unet)}
    inside = {ours: theirs for theirs, ours in _RESNET.items()}
    for path in paths:
        pieces = path.split(".")
        for cut in range(len(pieces), 0, -1):
            name = parts.get(".".join(pieces[:cut]))
            if name is not None:
                rest = pieces[cut:]
                if len(rest) == 1 and "resnets" in pieces:
                    rest = [inside.get(rest[0], rest[0])]
                yield ".".join([name, *rest]), path
                break
    yield from {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
    }.items()


def _paths(pattern: str) -> list[str]:
    """`a.(b c)` -> `a.b`, `a.c`."""
    match = re.fullmatch(r"(.*)\((.*)\)", pattern)
    return [pattern] if match is None else [match[1] + name for name in match[2].split()]


def _numbered(
    name: str, pattern: str, layers: Collection[str]
) -> Iterator[tuple[str, list[str], bool]]:
    """Expand one row of a table for each block of the model."""
    swapped, paths = pattern.startswith("~"), _paths(pattern.removeprefix("~"))
    if "{}" not in name:
        yield name, paths, swapped
        return
    for i in range(len(layers)):
        numbered = [path.replace("{}", str(i)) for path in paths]
        if numbered[0] not in layers:
            return
        # In the last block of Stable Diffusion 3 the norm of the text has only two parts.
        last_norm = (
            name.endswith("context_block.adaLN_modulation.1")
            and f"transformer_blocks.{i + 1}.norm1.linear" not in layers
        )
        yield name.replace("{}", str(i)), numbered, swapped or last_norm


def first_release_names(
    root: nn.Module, layers: Collection[str]
) -> Iterator[tuple[str, list[str], bool]]:
    """Names of a model's layers in its first release.

    Args:
        root: model of diffusers.
        layers: paths of the model's layers.

    Yields:
        Name, paths of the layers in the matrix of this name, and whether shift and scale are swapped.
    """
    if hasattr(root, "down_blocks") and hasattr(root, "up_blocks"):
        for name, path in _unet_names(root, layers):
            yield name, [path], False
    for name, pattern in _FIRST_RELEASE.get(type(root).__name__, {}).items():
        yield from _numbered(name, pattern, layers)
