"""Small transformers of true classes with random weights, with and without planted outlier channels.

Planting multiplies some channels in front of attention and of the feed-forward part by a factor and
divides the weights that read them by the same factor, so the model's function stays the same. It is what
trained diffusion transformers show: a few channels that are much larger than the median channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import pipelines

__all__ = ["MODELS", "build"]

WIDTH = 128
HEADS = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4}
CHANNELS = 3
FACTOR = 50.0


def _draw(generator: torch.Generator) -> Tensor:
    return torch.randperm(WIDTH, generator=generator)[:CHANNELS]


@torch.no_grad()
def _scale_modulation(linear: nn.Linear, part: int, channels: Tensor) -> None:
    """Multiply channels of a normalised input, whose shift is part `part` of the modulation."""
    shift, scale = part * WIDTH + channels, (part + 1) * WIDTH + channels
    linear.weight[torch.cat([shift, scale])] *= FACTOR
    linear.bias[shift] *= FACTOR
    linear.bias[scale] = FACTOR * (1 + linear.bias[scale]) - 1


@torch.no_grad()
def _divide(readers: Iterable[nn.Linear], channels: Tensor) -> None:
    for reader in readers:
        reader.weight[:, channels] /= FACTOR


@torch.no_grad()
def _open_gates(linear: nn.Linear, *parts: int) -> None:
    """Gates near 1, as in a trained model."""
    for part in parts:
        linear.bias[part * WIDTH : (part + 1) * WIDTH] += 1


def _plant_block(
    generator: torch.Generator, norm: Any, attention: Any, names: str, feed_forward: Any
) -> None:
    readers = [getattr(attention, name) for name in names.split()]
    for part, layers in ((0, readers), (3, [feed_forward.net[0].proj])):
        channels = _draw(generator)
        _scale_modulation(norm.linear, part, channels)
        _divide(layers, channels)


def _dit(*, planted: bool) -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        num_embeds_ada_norm=10,
        **HEADS,
    )
    generator = torch.Generator().manual_seed(1)
    for block in model.transformer_blocks:
        _open_gates(block.norm1.linear, 2, 5)
        if planted:
            attention = block.attn1
            _plant_block(generator, block.norm1, attention, "to_q to_k to_v", block.ff)
            channels = _draw(generator)
            with torch.no_grad():
                attention.to_v.weight[channels] *= FACTOR
                attention.to_v.bias[channels] *= FACTOR
            _divide([attention.to_out[0]], channels)
    pipeline = pipelines.dit()
    pipeline.register_modules(transformer=model)
    return pipeline


def _pixart(*, planted: bool) -> Any:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=32,
        use_additional_conditions=False,
        **HEADS,
    )
    generator = torch.Generator().manual_seed(1)
    shared = model.adaln_single.linear
    places = {0: _draw(generator), 3: _draw(generator)} if planted else {}
    for part, channels in places.items():
        # All blocks add their own table to one shared modulation.
        with torch.no_grad():
            rows = torch.cat([part * WIDTH + channels, (part + 1) * WIDTH + channels])
            shared.weight[rows] *= FACTOR
            shared.bias[rows] *= FACTOR
    for block in model.transformer_blocks:
        with torch.no_grad():
            block.scale_shift_table[[2, 5]] += 1
            for part, channels in places.items():
                block.scale_shift_table[part, channels] *= FACTOR
                scale = block.scale_shift_table[part + 1, channels]
                block.scale_shift_table[part + 1, channels] = FACTOR * (1 + scale) - 1
        if planted:
            attention = block.attn1
            _divide([attention.to_q, attention.to_k, attention.to_v], places[0])
            _divide([block.ff.net[0].proj], places[3])
    pipeline = pipelines.pixart()
    pipeline.register_modules(transformer=model)
    return pipeline


def _sd_3(*, planted: bool) -> Any:
    from diffusers import SD3Transformer2DModel

    pipeline = pipelines.sd_3()
    config = dict(pipeline.transformer.config)
    model = SD3Transformer2DModel.from_config(
        config | HEADS | {"num_layers": 3, "caption_projection_dim": WIDTH}
    )
    generator = torch.Generator().manual_seed(1)
    for block in model.transformer_blocks[:-1]:
        for norm, names, part in (
            (block.norm1, "to_q to_k to_v", block.ff),
            (block.norm1_context, "add_q_proj add_k_proj add_v_proj", block.ff_context),
        ):
            _open_gates(norm.linear, 2, 5)
            if planted:
                _plant_block(generator, norm, block.attn, names, part)
    pipeline.register_modules(transformer=model)
    return pipeline


def _flux(*, planted: bool) -> Any:
    from diffusers import FluxTransformer2DModel

    pipeline = pipelines.flux()
    config = dict(pipeline.transformer.config)
    model = FluxTransformer2DModel.from_config(
        config | HEADS | {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (8, 12, 12)}
    )
    generator = torch.Generator().manual_seed(1)
    for block in model.transformer_blocks:
        for norm, names, part in (
            (block.norm1, "to_q to_k to_v", block.ff),
            (block.norm1_context, "add_q_proj add_k_proj add_v_proj", block.ff_context),
        ):
            _open_gates(norm.linear, 2, 5)
            if planted:
                _plant_block(generator, norm, block.attn, names, part)
    for block in model.single_transformer_blocks:
        _open_gates(block.norm.linear, 2)
        if planted:
            channels = _draw(generator)
            _scale_modulation(block.norm.linear, 0, channels)
            attention = block.attn
            readers = [attention.to_q, attention.to_k, attention.to_v, block.proj_mlp]
            _divide(readers, channels)
    pipeline.register_modules(transformer=model)
    return pipeline


MODELS: dict[str, Callable[..., Any]] = {
    "dit": _dit,
    "pixart": _pixart,
    "sd_3": _sd_3,
    "flux": _flux,
}


def build(name: str, *, planted: bool) -> Any:
    """A pipeline with a random transformer of width 128; the same function, planted or not.

    Args:
        name: key of `MODELS`.
        planted: whether outlier channels are planted.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name](planted=planted)
