"""Roles of layers, observed in one call of the denoiser: first, last, embeddings, not called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.quant.hooks import input_hooks
from trtq.quant.plan import layer_kind, quantizable_layers

__all__ = ["LayerRoles", "observe_roles"]


@dataclass(frozen=True)
class LayerRoles:
    """Roles of a denoiser's layers in one call.

    Attributes:
        first: the linear layer or convolution that is called first among those with more than one row
            per image: the input layer; None: no such layer was called.
        last: the linear layer or convolution whose last call is the last among those: the output layer.
        embeddings: linear layers that are called with one row per image: embeddings and modulations.
        calls: number of calls of each called layer.
        rows: lengths of the first axis of each called layer's inputs, in ascending order.
        not_called: layers that the call does not reach.
        batch: number of images in the call.
    """

    first: str | None
    last: str | None
    embeddings: frozenset[str]
    calls: Mapping[str, int]
    rows: Mapping[str, tuple[int, ...]]
    not_called: frozenset[str]
    batch: int

    def rows_are_images(self, layers: Collection[str]) -> bool:
        """Whether the rows of all these layers are the images of the batch, in every call.

        Only then can each image have its own denoising step.

        Args:
            layers: paths of layers; layers that were not called do not count.
        """
        return all(self.rows.get(layer, (self.batch,)) == (self.batch,) for layer in layers)


def observe_roles(denoiser: nn.Module, run: Callable[[], object], batch: int) -> LayerRoles:
    """Roles of all linear layers, convolutions and products, from one call of the denoiser.

    Args:
        denoiser: float model; it is not changed.
        run: function that calls the denoiser once, with any arguments.
        batch: number of images in the call, e.g. 2 for one image with guidance in one batch.
    """
    layers = quantizable_layers(denoiser)
    order: list[str] = []
    rows: dict[str, set[int]] = {}
    several: set[str] = set()

    def observe(name: str, inputs: tuple[Any, ...]) -> None:
        order.append(name)
        if inputs:
            rows.setdefault(name, set()).add(len(inputs[0]) if inputs[0].ndim else 1)
            if _rows(layers[name], inputs[0]) > batch:
                several.add(name)

    with input_hooks(layers, observe), torch.no_grad():
        run()
    kinds = {name: layer_kind(module) for name, module in layers.items()}
    path = [name for name in order if name in several and kinds[name] != "product"]
    linear = {name for name in order if kinds[name] == "linear"}
    return LayerRoles(
        first=path[0] if path else None,
        last=path[-1] if path else None,
        embeddings=frozenset(linear - several),
        calls={name: order.count(name) for name in dict.fromkeys(order)},
        rows={name: tuple(sorted(lengths)) for name, lengths in rows.items()},
        not_called=frozenset(layers.keys() - set(order)),
        batch=batch,
    )


def _rows(layer: nn.Module, x: Tensor) -> int:
    """Number of vectors or positions that a layer processes, in all images together."""
    if isinstance(layer, nn.Linear):
        return x.numel() // max(layer.in_features, 1)
    return x.numel() // max(x.shape[1], 1) if x.ndim > 1 else x.numel()
