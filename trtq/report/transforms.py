"""Lines about transformed inputs, scales per row, and inputs with outlier channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trtq.limits import NOT_SCALED, OUTLIER_RATIO
from trtq.report.texts import counts_text, list_text

__all__ = ["transform_rows", "transform_text"]


def transform_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lines about transformed inputs, scales per row and inputs with outlier channels."""
    counts = Counter(transform_text(layer) for layer in layers)
    del counts[""]
    rows = [("input transforms", counts_text(counts))] if counts else []
    outliers = [
        layer
        for layer in layers
        if (layer.get("outlier_ratio") or 0) > OUTLIER_RATIO and layer.get("input_of") is None
    ]
    if outliers:
        outliers.sort(key=lambda layer: -layer["outlier_ratio"])
        names = [
            f"{layer['name']} {layer['outlier_ratio']:.0f} x ({_done(layer)})" for layer in outliers
        ]
        rows.append((f"largest channel over {OUTLIER_RATIO:g} x the median", list_text(names)))
    return rows


def _done(layer: Mapping[str, Any]) -> str:
    """What happens to an input with outliers, and if nothing happens, why."""
    obstacle = (layer.get("reason") or "").partition(NOT_SCALED)[2]
    return transform_text(layer) or f"unchanged: {obstacle}".removesuffix(": ")


def transform_text(layer: Mapping[str, Any]) -> str:
    """What happens to the input of a layer before it is quantised; empty: nothing."""
    parts = ["smoothed"] if layer.get("smooth") else []
    if layer.get("rotate"):
        parts.append(f"rotated by {layer['rotate']}")
    if layer.get("scales", "step") != "step":
        parts.append(f"{layer['scales']} scales")
    return ", ".join(parts)
