"""How far a runtime's floats are from torch's: measured with the low-bit layers in float."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trtq.comparison.call_set import CallSet, Feeds
from trtq.comparison.forms import float_graph, float_layers, model_in
from trtq.comparison.sides import LastBits, Side
from trtq.exporter.last_bits import LAST_BIT
from trtq.quant.geometry import CONVOLUTIONS
from trtq.quant.hooks import input_hooks
from trtq.quant.structure import replace_module

__all__ = ["MAX_DIFFERENCE", "runtime_differences"]

MAX_DIFFERENCE = 2.0**-12
"""Largest difference that counts as one of last bits, relative to the channel. Chosen by hand; a runtime
that is further away computes something else."""
_IMAGES = 4

_Inputs = dict[str, tuple[Tensor, ...]]


def runtime_differences(
    side: Side, denoiser: nn.Module, calls: CallSet
) -> dict[str, tuple[Tensor, ...]]:
    """The relative differences of a runtime's floats from those of torch, in the inputs of the layers.

    All low-bit layers are turned into float layers in the graph and in torch, so that no code can flip,
    and the inputs of these layers are compared in the first call and in the middle one, channel by
    channel: a norm in float32 errs by as much in a channel of small values as in the largest one.

    Args:
        side: the side that the runtime computes.
        denoiser: the low-bit denoiser in torch.
        calls: the calls.

    Returns:
        For each layer and input the root mean square of the difference in each channel; at least
        `LAST_BIT` and at most `MAX_DIFFERENCE` times that of the input.
    """
    floats = float_layers(denoiser, [row.name for row in side.layers])
    in_torch = deepcopy(denoiser)
    for name, layer in floats.items():
        replace_module(model_in(in_torch), name, layer)
    few = calls.few(_IMAGES)
    differences: LastBits = {}
    with tempfile.TemporaryDirectory(prefix="trtq-float-") as scratch:
        engine, marked = float_graph(side, floats, Path(scratch) / "graph")
        for index in sorted({0, len(few.feeds) // 2}):
            feeds = few.feeds[index]
            expected = _inputs(in_torch, floats, few, feeds)
            given = engine.run(feeds)
            for name, layer in floats.items():
                if name not in expected:
                    continue
                axis = 1 if isinstance(layer, CONVOLUTIONS) else -1
                changes = tuple(
                    _difference(reference, torch.from_numpy(np.array(given[output])), axis)
                    for reference, output in zip(expected[name], marked[name], strict=True)
                )
                if name in differences:
                    changes = tuple(map(torch.maximum, differences[name], changes))
                differences[name] = changes
    return differences


def _inputs(
    denoiser: nn.Module, floats: Mapping[str, nn.Module], calls: CallSet, feeds: Feeds
) -> _Inputs:
    """The inputs of float layers in torch, of the last call of each."""
    modules = dict(model_in(denoiser).named_modules())
    inputs: _Inputs = {}

    def keep(name: str, values: tuple[Tensor, ...]) -> None:
        inputs[name] = values

    with input_hooks({name: modules[name] for name in floats}, keep):
        calls.call(denoiser, feeds)
    return inputs


def _difference(reference: Tensor, given: Tensor, axis: int) -> Tensor:
    """Root mean square of the difference in each channel, shaped for a sum with the input."""
    axes = [place for place in range(reference.ndim) if place != axis % reference.ndim]
    difference = (given.float().reshape(reference.shape) - reference).square().mean(axes, True)
    size = reference.square().mean(axes, True)
    low, high = (ratio * size.sqrt() for ratio in (LAST_BIT, MAX_DIFFERENCE))
    return difference.sqrt().clamp(low, high)
