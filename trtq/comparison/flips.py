"""How many images may have a flipped code: measured in torch, by a change of last bits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from torch import nn

from trtq.comparison.agreement import Flips
from trtq.comparison.call_set import CallSet
from trtq.comparison.forms import outputs_of
from trtq.comparison.sides import Side
from trtq.exporter.call_parity import CHANGES
from trtq.exporter.last_bits import LAST_BIT, last_bit_moved
from trtq.exporter.parity import MAX_TIES_ANYWHERE
from trtq.pipelines.open import TORCH

__all__ = ["flips_of"]

_FLOAT32 = 2.0**-18
"""Relative difference of two runtimes of which one sums norms in float32, or approximates exponentials.
On 2026-11-30 OpenVINO flipped codes in as many images of the digits UNet (22 to 35 %) as a change of
torch's inputs by 2**-20 did, and of the digits transformer (25 to 55 %) as a change by 2**-19 to 2**-18
did (W4A4, 4 steps)."""
_HALF = 2.0**-11
"""The same for values in half precision."""
_FLIPPING = Flips(None, by_share=True, per_call=MAX_TIES_ANYWHERE, overall=MAX_TIES_ANYWHERE)
"""For runtimes that sum norms in float32: codes flip in a third of the images, and a wrong graph changes
all of them."""


def flips_of(
    sides: tuple[Side, Side],
    calls: CallSet,
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
    # In few images the share of flips over all calls says nothing about one of them.
    rare = Flips(overall=MAX_TIES_ANYWHERE) if calls.few_images else Flips()
    if not reference.layers:
        return rare
    exact = {side.provider for side in sides} <= {TORCH, "cpu"}
    if denoiser is None:
        denoiser = reference.torch_denoiser()
    if denoiser is None:
        return rare if exact else _FLIPPING
    model, relative = denoiser, LAST_BIT if exact else _FLOAT32
    if half:
        relative = _HALF
    changes = [relative * change / LAST_BIT for change in CHANGES] if exact else 4 * [relative]
    if not calls.few_images:
        changes = changes[:1]

    def moved(index: int, pattern: int) -> dict[str, np.ndarray]:
        with last_bit_moved(model, changes[pattern], pattern):
            return outputs_of(model, calls, calls.feeds[index], layers)

    return replace(rare if exact else _FLIPPING, moved=moved, patterns=len(changes))
