"""Signal-to-noise ratio of tensors."""

from __future__ import annotations

import math

from torch import Tensor

EXACT_DB = 200.0
"""SNR of tensors that are equal bit for bit; float32 tensors that differ stay far below."""


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-noise ratio of `other` against `reference` in dB; `EXACT_DB` if they are equal."""
    noise = (other.double() - reference.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    if noise == 0:
        return EXACT_DB
    return 10 * math.log10(signal / noise) if signal > 0 else -EXACT_DB
