"""The names that LoRA files give to layers, of every layout, and the layers that they mean.

A file names a layer by a component and a path in it. Trainers write the path with dots (diffusers,
PEFT, ComfyUI) or with underscores (kohya), in diffusers' names or in those of the model's first
release. All of them are looked up in one form, with underscores; what differs is told by tables that
follow from the model's own structure, so that they hold for any width and depth.

Layers that the first release keeps as one (`img_attn.qkv`) are several in diffusers: a site is the
list of layers whose output channels, one after another, are those of the file's matrix.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Layer", "Names", "Site", "base_model_of"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution of a pipeline.

    Attributes:
        component: its name in the pipeline, e.g. `unet`.
        path: its path in the component.
        module: itself, with a weight `[N, K, ...]`.
    """

    component: str
    path: str
    module: Any


@dataclass(frozen=True, eq=False)
class Site:
    """What one name of a file means.

    Attributes:
        layers: their output channels follow one another in the file's matrix.
        swapped: the file holds shift before scale, diffusers scale before shift: its halves change
            places.
    """

    layers: tuple[Layer, ...]
    swapped: bool = False


# Fronts that mean the denoiser, whatever it is called in the pipeline.
_DENOISER_FRONTS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_TEXT_FRONTS = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.clip_g.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
_T5_FRONTS = (
    "lora_te3_",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.t5xxl.",
    "t5xxl.",
    "t5.",
)
_WRAPPERS = ("base_model.model.", "module.")

# First release -> diffusers. `{}` counts blocks; several targets follow one another in one matrix;
# `~` swaps shift and scale.
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
    # XLabs names the layers of its own attention processors.
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
# Their LoRAs are renamed by diffusers, which knows the names of these models' trainers.
_CONVERTED = {
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "Flux3Transformer2DModel": "Flux3LoraLoaderMixin",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoLoraLoaderMixin",
    "Ideogram4Transformer2DModel": "Ideogram4LoraLoaderMixin",
    "Krea2Transformer2DModel": "Krea2LoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
    "LTX2VideoTransformer3DModel": "LTX2LoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Parts of a UNet: (name in the first release of Stable Diffusion, path in diffusers)."""
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
    """(name in the first release, path in diffusers) of every layer of a UNet."""
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


def _written_out(pattern: str) -> list[str]:
    """`a.(b c)` -> `a.b`, `a.c`."""
    match = re.fullmatch(r"(.*)\((.*)\)", pattern)
    return [pattern] if match is None else [match[1] + name for name in match[2].split()]


class Names:
    """Every linear layer and convolution of a pipeline under each name that a LoRA may give it."""

    def __init__(self, components: Mapping[str, nn.Module], denoiser: str) -> None:
        """Args: the float models by their names in the pipeline; which of them denoises."""
        self.components = components
        self.denoiser = denoiser
        self._sites: dict[str, dict[str, Site]] = {}
        for component, root in components.items():
            layers = {
                path: Layer(component, path, module)
                for path, module in root.named_modules()
                if isinstance(module, _KINDS)
            }
            self._sites[component] = self._of(root, layers)
        kinds = [(name, type(part).__name__) for name, part in components.items()]
        t5 = next((name for name, kind in kinds if kind.startswith(("T5", "UMT5"))), None)
        self._fronts = dict.fromkeys(_DENOISER_FRONTS, denoiser) | _TEXT_FRONTS
        self._fronts |= dict.fromkeys(_T5_FRONTS, t5 or "text_encoder_3")

    def _of(self, root: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Site]:
        sites = {_flat(path): Site((layer,)) for path, layer in layers.items()}

        def also(name: str, *paths: str, swapped: bool = False) -> None:
            if all(path in layers for path in paths):
                sites.setdefault(_flat(name), Site(tuple(layers[path] for path in paths), swapped))

        for path in layers:
            if path.endswith(".to_out.0"):
                also(path.removesuffix(".0"), path)
                also(path.removesuffix(".to_out.0") + ".out", path)
            for ours, older in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v")):
                if path.endswith(f".self_attn.{ours}"):
                    also(path.removesuffix(ours) + older, path)
            if path.endswith(".self_attn.out_proj"):
                also(path.removesuffix("out_proj") + "to_out", path)
        if hasattr(root, "down_blocks") and hasattr(root, "up_blocks"):
            for name, path in _unet_names(root, layers):
                also(name, path)
        for theirs, pattern in _FIRST_RELEASE.get(type(root).__name__, {}).items():
            paths = _written_out(pattern.removeprefix("~"))
            for i in range(len(layers) if "{}" in theirs else 1):
                numbered = [path.replace("{}", str(i)) for path in paths]
                if "{}" in theirs and numbered[0] not in layers:
                    break
                # The last block of Stable Diffusion 3 has a norm of two parts for its text.
                swapped = pattern.startswith("~") or (
                    theirs.endswith("context_block.adaLN_modulation.1")
                    and f"transformer_blocks.{i + 1}.norm1.linear" not in layers
                )
                also(theirs.replace("{}", str(i)), *numbered, swapped=swapped)
        # transformers 5 has no `text_model` in CLIPTextModel any more, and still has it in
        # CLIPTextModelWithProjection; files are written with it and without.
        for name, site in list(sites.items()):
            if name.startswith("text_model_"):
                sites.setdefault(name.removeprefix("text_model_"), site)
            elif name.startswith("encoder_layers_"):
                sites.setdefault(f"text_model_{name}", site)
        return sites

    @property
    def kind(self) -> str:
        """The denoiser's class."""
        return type(self.components.get(self.denoiser)).__name__

    def split(self, name: str) -> tuple[str | None, str]:
        """A file's name for a layer -> (component, or None where it names none; path in it)."""
        for front in _WRAPPERS:
            while name.startswith(front):
                name = name.removeprefix(front)
        for component in self.components:
            if name.startswith(f"{component}."):
                rest = name.removeprefix(f"{component}.")
                return component, rest.removeprefix("base_model.model.")
        for front, component in self._fronts.items():
            if name.startswith(front):
                return component, name.removeprefix(front)
        return None, name

    def _inside(self, component: str, path: str) -> Site | None:
        flat = _flat(path.replace(".processor.", ".").replace("_processor_", "_"))
        return self._sites.get(component, {}).get(flat)

    def find(self, names: Iterable[str]) -> tuple[dict[str, Site], list[str]]:
        """The sites of a file's names, and the names that mean nothing here."""
        found: dict[str, Site] = {}
        missing: list[str] = []
        bare: list[str] = []
        for name in names:
            component, path = self.split(name)
            site = self._inside(component or self.denoiser, path)
            if site is not None:
                found[name] = site
            elif component is None:
                bare.append(name)
            else:
                missing.append(name)
        # A file of a text encoder alone names no component: the only one that has all its layers.
        if bare and not found and not missing:
            owners = [
                component
                for component in self._sites
                if all(self._inside(component, self.split(name)[1]) for name in bare)
            ]
            if len(owners) == 1:
                sites = {name: self._inside(owners[0], self.split(name)[1]) for name in bare}
                return {name: site for name, site in sites.items() if site is not None}, []
        return found, missing + bare

    def renamed_by_diffusers(self, outputs: Mapping[str, int]) -> dict[str, Site]:
        """Sites of names that only diffusers' own converters know, of those that they translate.

        The converters are given numbers in place of weights: each row of `lora_B` holds its own
        number, so that what they rename, split or reorder can be read off.

        Args:
            outputs: the number of output channels of each name.
        """
        mixin = _CONVERTED.get(self.kind)
        if mixin is None:
            return {}
        loader = getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), mixin, None)
        if loader is None:
            return {}
        order = list(outputs)
        probes = {}
        for number, (name, rows) in enumerate(outputs.items()):
            numbers = torch.arange(1, rows + 1, dtype=torch.float64)
            for down, up in (
                (("lora_down", "lora_up"),) if "lora_unet_" in name else (("lora_A", "lora_B"),)
            ):
                probes[f"{name}.{down}.weight"] = torch.full(
                    (1, 1), number + 1.0, dtype=torch.float64
                )
                probes[f"{name}.{up}.weight"] = numbers[:, None]
        try:
            converted = loader.lora_state_dict(probes)
        except Exception:  # what it cannot read is reported as not found
            return {}
        if isinstance(converted, tuple):
            converted = converted[0]
        pieces: dict[str, list[tuple[int, int, Layer]]] = {}
        sites = self._sites.get(self.denoiser, {})
        for key, down in converted.items():
            if not key.endswith(".lora_A.weight"):
                continue
            path = key.removesuffix(".lora_A.weight").removeprefix("transformer.")
            up = converted.get(key.replace(".lora_A.", ".lora_B."))
            site = sites.get(_flat(path))
            if up is None or site is None or len(site.layers) != 1:
                continue
            name = order[int(down.flatten()[0]) - 1]
            first, last = int(up.flatten()[0]), int(up.flatten()[-1])
            if last - first + 1 == len(up):
                pieces.setdefault(name, []).append((first, last, site.layers[0]))
        found = {}
        for name, parts in pieces.items():
            parts.sort(key=lambda part: part[0])
            starts = [1, *(last + 1 for _, last, _ in parts)]
            if [first for first, _, _ in parts] == starts[:-1] and starts[-1] == outputs[name] + 1:
                found[name] = Site(tuple(layer for _, _, layer in parts))
        return found


def base_model_of(names: Iterable[str], inputs: Mapping[str, int]) -> str | None:
    """The base model that a LoRA looks like, from its names and the input widths of its layers."""
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
