"""How many images may have a flipped code: measured in torch, by a change of last bits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from torch import nn

from trtq.comparison.bounds import Flips
from trtq.comparison.calls import DenoiserCalls
from trtq.comparison.forms import outputs_of
from trtq.comparison.sides import Side
from trtq.exporter.last_bits import last_bit_moved
from trtq.exporter.parity import MAX_TIES_ANYWHERE
from trtq.pipelines.open import TORCH

__all__ = ["flips_of"]

_LAST_BITS = 2.0**-22
"""Relative difference of two runtimes that compute norms in float64, see `trtq.exporter.parity`."""
_FLOAT32 = 2.0**-18
"""The same if one of them sums norms in float32, or approximates exponentials. On 2026-11-30 OpenVINO
flipped codes in as many images of the digits UNet (22 to 35 %) as a change of torch's inputs by 2**-20
did, and of the digits transformer (25 to 55 %) as a change by 2**-19 to 2**-18 did (W4A4, 4 steps)."""
_HALF = 2.0**-11
"""The same for values in half precision."""
_EXACT = Flips()
_FLIPPING = Flips(None, MAX_TIES_ANYWHERE, MAX_TIES_ANYWHERE)
"""For runtimes that sum norms in float32: codes flip in a third of the images, and a wrong graph changes
all of them."""


def flips_of(
    sides: tuple[Side, Side],
    calls: DenoiserCalls,
    denoiser: nn.Module | None,
    layers: Collection[str] = (),
    *,
    half: bool = False,
) -> Flips:
    """How many images may have a flipped code: those that flip in torch if last bits change.

    Args:
        sides: the reference and the other side.
        calls: the calls.
        denoiser: the reference in torch; None: the run that the reference was exported from is asked,
            if it is at hand.
        layers: layers whose outputs are compared, too.
        half: whether the last bits are those of half precision.
    """
    reference = sides[0]
    if not reference.layers:
        return _EXACT
    exact = {side.provider for side in sides} <= {TORCH, "cpu"}
    if denoiser is None:
        denoiser = reference.torch_denoiser()
    if denoiser is None:
        return _EXACT if exact else _FLIPPING
    model, relative = denoiser, _LAST_BITS if exact else _FLOAT32
    if half:
        relative = _HALF

    def moved(index: int) -> dict[str, np.ndarray]:
        with last_bit_moved(model, relative):
            return outputs_of(model, calls.family, calls.feeds[index], layers)

    return replace(_EXACT if exact else _FLIPPING, moved=moved)
