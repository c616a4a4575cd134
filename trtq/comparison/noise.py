"""Rounding noise of low-bit formats, and the bound of two artefacts that hold different numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trtq.artefact.manifest_rows import LayerRow
from trtq.snr import EXACT_DB

__all__ = ["layer_noise", "noise_bound_db"]

_UNIFORM = {
    2: 0.1188,
    3: 0.03744,
    4: 0.01154,
    5: 0.003495,
    6: 0.001041,
    7: 0.0003035,
    8: 0.00008714,
}
"""Mean squared error of the best uniform quantiser of `bits` bits for a Gaussian variable of variance 1.
Source: N. S. Jayant, P. Noll: Digital Coding of Waveforms, table 4.1 (2 to 5 bits: J. Max, IRE Trans.
Inf. Theory 6, 1960)."""
_E4M3 = 0.00070
"""The same for a Gaussian variable rounded to E4M3: three bits after the leading one."""
_E2M1 = 0.0091
"""The same for a Gaussian variable in E2M1 with blocks of 16 values and E4M3 scales (NVFP4)."""


def layer_noise(row: LayerRow) -> float:
    """Ratio of a layer's rounding noise to its output, in power.

    The noises of weight and input are independent, so that they add up.

    Args:
        row: entry of the layer in the manifest.

    Returns:
        The ratio; 0 for a layer in float.
    """
    if row.activation_bits is None:
        return 0.0
    if row.format == "fp8":
        return 2 * _E4M3
    if row.format == "nvfp4":
        return 2 * _E2M1
    widths = (row.weight_bits, row.activation_bits, row.right_bits)
    return sum(_UNIFORM.get(bits, 0.0) for bits in widths if bits is not None)


def noise_bound_db(layers: Iterable[LayerRow]) -> float:
    """SNR, in dB, of an output behind these layers against the same model in float.

    Every layer adds its noise once, no layer amplifies the noise of an earlier one, and all noises are
    independent. A model whose output is worse than this has layers that amplify noise, or outliers that
    its formats cannot hold.
    """
    noise = sum(layer_noise(row) for row in layers)
    return -10 * math.log10(noise) if noise > 0 else EXACT_DB
