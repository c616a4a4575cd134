"""How far a runtime's floats are from torch's: measured with the low-bit layers in float."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trtq.comparison.call_set import CallSet
from trtq.comparison.forms import (
    float_layers,
    marked_float_graph,
    model_in,
    outputs_of,
)
from trtq.comparison.sides import Side
from trtq.exporter.last_bits import LAST_BIT, last_bit_moved
from trtq.quant.structure import replace_module
from trtq.snr import snr_db

__all__ = ["MAX_DIFFERENCE", "runtime_differences"]

MAX_DIFFERENCE = 2.0**-16
"""Largest relative difference that counts as one of last bits: that of a sum of some hundreds of values
in float32. Chosen by hand; a runtime that is further away computes something else."""
_PROBE = 2.0**-18
"""Relative change of the inputs of all layers in torch, far below the point where the response to it is
no longer linear, and far above the last bit."""
_IMAGES = 4


def runtime_differences(side: Side, denoiser: nn.Module, calls: CallSet) -> dict[str, float]:
    """The relative differences of a runtime's floats from those of torch, layer by layer.

    All low-bit layers are turned into float layers in the graph and in torch, so that no code can flip,
    and the outputs of these layers are compared in the first call and in the middle one. The difference
    at a layer has grown through the layers before it, so it is divided by that of torch with all layer
    inputs changed by a known ratio.

    Args:
        side: the side that the runtime computes.
        denoiser: the low-bit denoiser in torch.
        calls: the calls.

    Returns:
        For each layer the relative change of all layer inputs that changes its output in torch as much
        as the runtime does; at least `LAST_BIT` and at most `MAX_DIFFERENCE`.
    """
    floats = float_layers(denoiser, [row.name for row in side.layers])
    in_torch = deepcopy(denoiser)
    for name, layer in floats.items():
        replace_module(model_in(in_torch), name, layer)
    probe = dict.fromkeys(floats, _PROBE)
    few = calls.few(_IMAGES)
    found = dict.fromkeys(floats, LAST_BIT)
    with tempfile.TemporaryDirectory(prefix="trtq-float-") as scratch:
        engine = marked_float_graph(side, floats, Path(scratch) / "graph")
        for index in sorted({0, len(few.feeds) // 2}):
            feeds = few.feeds[index]
            expected = outputs_of(in_torch, few, feeds, floats)
            with last_bit_moved(model_in(in_torch), probe, 1):
                moved = outputs_of(in_torch, few, feeds, floats)
            given = engine.run(feeds)
            for name in floats:
                if name in expected:
                    ratio = _ratio(expected[name], given[name]) / _ratio(
                        expected[name], moved[name]
                    )
                    found[name] = max(found[name], _PROBE * ratio)
    return {name: min(difference, MAX_DIFFERENCE) for name, difference in found.items()}


def _ratio(expected: np.ndarray, given: np.ndarray) -> float:
    reference = torch.from_numpy(expected)
    other = torch.from_numpy(np.array(given)).float().reshape(reference.shape)
    return float(10 ** (-snr_db(reference, other) / 20))
