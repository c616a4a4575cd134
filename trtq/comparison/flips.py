"""How many images may have a flipped code: measured in torch, by a change of last bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from trtq.comparison.agreement import FLIPS_MARGIN, Flips
from trtq.comparison.call_set import CallSet
from trtq.comparison.forms import model_in, outputs_of
from trtq.comparison.runtime_bits import runtime_differences
from trtq.comparison.sides import Side
from trtq.exporter.call_parity import CHANGES
from trtq.exporter.last_bits import LAST_BIT, Change, last_bit_moved
from trtq.exporter.parity import MAX_TIES_ANYWHERE
from trtq.pipelines.open import TORCH
from trtq.quant.formats import QUANTIZED_INPUTS

__all__ = ["flips_of"]

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
    model, other = denoiser, sides[1]
    relative = _HALF if half else LAST_BIT
    differences: Mapping[str, Change] = {}
    if not exact and not half and other.graph is not None:
        differences = other.last_bits(lambda: runtime_differences(other, model, calls))
    # The low-bit layers of the model: in a bisection some are in float.
    low_bit = {
        name: differences.get(name, relative)
        for name, module in model_in(model).named_modules()
        if isinstance(module, QUANTIZED_INPUTS)
    }
    if exact:
        factors = [change / LAST_BIT for change in (CHANGES if calls.few_images else CHANGES[:1])]
    else:
        factors = 3 * [1.0] + 3 * [FLIPS_MARGIN]

    def moved(index: int, pattern: int) -> dict[str, np.ndarray]:
        change = {name: _scaled(ratio, factors[pattern]) for name, ratio in low_bit.items()}
        with last_bit_moved(model_in(model), change, pattern):
            return outputs_of(model, calls, calls.feeds[index], layers)

    return replace(
        rare if exact else _FLIPPING, moved=moved, patterns=len(factors), plain=factors.count(1.0)
    )


def _scaled(change: Change, factor: float) -> Change:
    if isinstance(change, float):
        return factor * change
    return tuple(factor * ratio for ratio in change)
