"""Outlier channels of a diffusion transformer: planted without changing its function, and measured.

Letters: B images; S tokens; C input channels of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channel_ratios", "plant_outliers"]


@torch.no_grad()
def plant_outliers(model: Any, channels: int, factor: float, seed: int) -> None:
    """Multiply random channels at the inputs of a DiT's layers; divide the layers' weights.

    In every block, `channels` channels are multiplied at each of three places: at the input of the
    attention's q, k and v and at the input of the feed-forward, both by the rows of `norm1.linear` that
    give shift and scale, and at the input of `to_out.0`, by the rows of `to_v`. The columns of the
    layers that read them are divided by the same factor. With a power of two the outputs are equal
    except for the rounding of the scale rows' biases.

    Args:
        model: `DiTTransformer2DModel` with adaptive norms (`ada_norm_zero`).
        channels: number of channels per place.
        factor: factor of the channels.
        seed: seed of the choice of channels.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer_blocks:
        width = block.attn1.to_q.in_features
        places = torch.stack(
            [torch.randperm(width, generator=generator)[:channels] for _ in range(3)]
        )
        # Rows of norm1.linear: shift, scale, gate of the attention, then of the feed-forward.
        readers = [
            (0, places[0], (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)),
            (3, places[1], (block.ff.net[0].proj,)),
        ]
        for first, chosen, layers in readers:
            norm = block.norm1.linear
            shift, scale = first * width + chosen, (first + 1) * width + chosen
            for rows in (shift, scale):
                norm.weight[rows] *= factor
                norm.bias[rows] *= factor
            # The norm multiplies by 1 + scale.
            norm.bias[scale] += factor - 1
            for layer in layers:
                layer.weight[:, chosen] /= factor
        block.attn1.to_v.weight[places[2]] *= factor
        block.attn1.to_v.bias[places[2]] *= factor
        block.attn1.to_out[0].weight[:, places[2]] /= factor


@torch.no_grad()
def channel_ratios(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Largest over median channel of every linear layer's input, by name of the layer.

    A channel's size is its largest absolute value over all calls, images and tokens.

    Args:
        model: model with linear layers.
        run: function that calls the model, e.g. that draws images with it.
    """
    sizes: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest = inputs[0].abs().flatten(0, -2).amax(0)
            sizes[name] = torch.maximum(sizes[name], largest) if name in sizes else largest

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(size.max() / size.median()) for name, size in sizes.items()}
