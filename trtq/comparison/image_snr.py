"""Comparison function of polygraphy: the SNR over the images of a batch without a flipped code.

`trtq verify --script` copies this file next to the inputs, so it needs polygraphy and numpy only:

    polygraphy run model.onnx --onnxrt --compare-func-script compare.py ...

A value within its last bits of a rounding tie gets the other code in another runtime. In a 4-bit network
that changes the output of its image, and of no other image, so such images are set aside as long as they
are as few as expected. A wrong graph changes every image.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.comparator import BaseCompareFunc, SnrResult, SnrThreshold

__all__ = ["EXACT_DB", "ImageSnr", "call_key", "compare_outputs"]

EXACT_DB = 200.0
"""SNR of outputs that are equal bit for bit."""
TIE_DB = 60.0
"""Minimum SNR, in dB, of an image without a flipped code."""
MIN_ITEMS = 3
"""Minimum number of items at one step of which the majority may not differ."""


def call_key(outputs: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the outputs of one call of the reference."""
    digest = hashlib.sha256()
    for name in sorted(outputs):
        digest.update(name.encode() + np.ascontiguousarray(outputs[name]).tobytes())
    return digest.hexdigest()


class ImageSnr(BaseCompareFunc):  # type: ignore[misc]
    """Compares the outputs of two runners, image by image.

    Args:
        bounds: `{"default": {output: bound}, "calls": {key: {output: bound}}}`. The key is `call_key` of
            the reference's outputs; the entry "" stands for every other output, and an output without an
            entry is not compared. A bound holds `min_db`,
            the required SNR in dB; `max_ties`, the share of images that may be set aside (below 0:
            none); `channels`, the number of entries of axis 1 that are compared (None: all);
            `steps`, the index of each image's step in a batch of mixed steps (None: one step), and
            `step_ties`, the share of the images of one such step that may differ; and `whole`, whether
            the output is one image without an axis of the batch.
    """

    _RESULT_CLASS = SnrResult

    def __init__(self, bounds: Mapping[str, Any]) -> None:
        self.bounds = bounds

    def thresholds_for(self, output_name: str) -> SnrThreshold:
        """The threshold of an output at calls without a bound of their own."""
        bound = _bound(self.bounds["default"], output_name)
        return SnrThreshold(-EXACT_DB if bound is None else bound["min_db"])

    def __call__(self, first: Any, second: Any) -> OrderedDict[str, Any]:
        """The SNR of every output that both results of one iteration have."""
        calls = self.bounds["calls"]
        reference, other = first, second
        bounds = calls.get(call_key(dict(first.items())))
        if bounds is None:
            bounds = calls.get(call_key(dict(second.items())))
            if bounds is not None:
                reference, other = second, first
        bounds = bounds or self.bounds["default"]
        results: OrderedDict[str, Any] = OrderedDict()
        for name, expected in reference.items():
            bound = _bound(bounds, name)
            if name in other and bound is not None:
                result = SnrResult(
                    _snr(np.asarray(expected), np.asarray(other[name]), bound),
                    thresholds=SnrThreshold(bound["min_db"]),
                )
                result.output0_name = result.output1_name = name
                results[name] = result
        return results


def _bound(bounds: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return bounds.get(name) or bounds.get("")


def _snr(expected: np.ndarray, given: np.ndarray, bound: Mapping[str, Any]) -> float:
    given = given.reshape(expected.shape)
    if bound["whole"]:
        expected, given = expected[None], given[None]
    if bound["channels"] is not None:
        expected, given = expected[:, : bound["channels"]], given[:, : bound["channels"]]
    each = np.array([_db(a, b) for a, b in zip(expected, given, strict=True)])
    for step in sorted(set(bound["steps"] or ())):
        at = np.array(bound["steps"]) == step
        if at.sum() >= MIN_ITEMS and (each[at] < TIE_DB).mean() > bound["step_ties"]:
            return _db(expected[at], given[at])
    kept = each >= TIE_DB
    if 1 - kept.mean() > bound["max_ties"]:
        kept[:] = True
    return _db(expected[kept], given[kept])


def _db(expected: np.ndarray, given: np.ndarray) -> float:
    noise = float(np.square(given.astype(np.float64) - expected.astype(np.float64)).sum())
    signal = float(np.square(expected.astype(np.float64)).sum())
    if not np.isfinite(noise):
        return -EXACT_DB
    if noise == 0:
        return EXACT_DB
    return 10 * float(np.log10(signal / noise)) if signal > 0 else -EXACT_DB


def compare_outputs(first: Any, second: Any) -> OrderedDict[str, Any]:
    """Compare one iteration by the bounds in `bounds.json`, next to this file."""
    file = Path(__file__).with_name("bounds.json")
    return ImageSnr(json.loads(file.read_text(encoding="utf-8")))(first, second)
