"""Names of latent-diffusion for the tensors of a `UNet2DConditionModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trtq.checkpoint.conversion_probe import ConversionError

__all__ = ["unet_original"]

_PREFIX = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_original(name: str, config: Mapping[str, Any]) -> str:
    """The name in a file of latent-diffusion of a tensor of a `UNet2DConditionModel`.

    Blocks are counted through: a level has `layers_per_block` blocks and a last one that changes the
    resolution, in the decoder together with its last block.

    Args:
        name: name of the tensor in diffusers.
        config: configuration of the model.

    Raises:
        ConversionError: latent-diffusion has no such tensor.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ConversionError("its levels have different numbers of layers")
    return _PREFIX + _plain(name, layers, config)


def _plain(name: str, layers: int, config: Mapping[str, Any]) -> str:
    if match := _BLOCK.fullmatch(name):
        side, level, part, index, rest = match.groups()
        block = (layers + 1) * int(level) + int(index)
        if side == "down":
            return f"input_blocks.{block + 1}.{_place(part, rest)}"
        return f"output_blocks.{block}.{_place(part, rest)}"
    if match := _SAMPLER.fullmatch(name):
        side, level, rest = match.groups()
        if side == "down":
            return f"input_blocks.{(layers + 1) * (int(level) + 1)}.0.op.{rest}"
        attends = "Attn" in config["up_block_types"][int(level)]
        return f"output_blocks.{(layers + 1) * int(level) + layers}.{1 + attends}.conv.{rest}"
    if match := _MIDDLE.fullmatch(name):
        part, index, rest = match.groups()
        block = 2 * int(index) + (part == "attentions")
        return f"middle_block.{block}.{_place(part, rest, middle=True)}"
    return _outer(name, config)


def _place(part: str, rest: str, *, middle: bool = False) -> str:
    """The end of a name inside a block: a residual block comes first, its attention second."""
    if part == "attentions":
        return rest if middle else f"1.{rest}"
    head, _, tail = rest.partition(".")
    renamed = f"{_RESNET.get(head, head)}.{tail}"
    return renamed if middle else f"0.{renamed}"


def _outer(name: str, config: Mapping[str, Any]) -> str:
    """The names outside the blocks, which diffusers lists."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    for table in DIFFUSERS_TO_LDM_MAPPING["unet"].values():
        if name in table:
            return str(table[name])
    if name == "class_embedding.weight":
        return "label_emb.weight"
    raise ConversionError(f"latent-diffusion has no tensor for {name!r}")
