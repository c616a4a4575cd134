"""GPU architectures that a build uses if the user names none."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir

from trtq.artefact.manifest import Manifest
from trtq.errors import UsageError
from trtq.graph.runtimes.format_rules import MIN_ARCHITECTURE, capable

__all__ = ["suitable_architectures"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "weight_only": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}


def suitable_architectures(names: Sequence[str], manifest: Manifest) -> list[str]:
    """Those of the default architectures that can compute every layer of an artefact.

    Args:
        names: the default architectures.
        manifest: manifest of the artefact.

    Raises:
        UsageError: none of them can.
    """
    needed = {
        _DTYPES[row.format]
        for row in [*manifest.layers, *(r for part in manifest.further for r in part.layers)]
        if row.format in _DTYPES and (row.format, row.weight_bits) != ("weight_only", 8)
    }
    chosen = [name for name in names if all(capable(dtype, name) for dtype in needed)]
    formats = ", ".join(sorted(MIN_ARCHITECTURE[dtype][0] for dtype in needed))
    if not chosen:
        raise UsageError(f"none of {', '.join(names)} computes {formats}; name others with --arch")
    left_out = [name for name in names if name not in chosen]
    if left_out:
        logger.warning("not built for %s, which cannot compute %s", ", ".join(left_out), formats)
    return chosen
