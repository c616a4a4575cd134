"""Agreement of outputs call by call, and the bounds that polygraphy checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.comparison.agreement import Bound, Flips, Pair, agreements
from trtq.comparison.call_set import CallSet, Outputs
from trtq.exporter.parity import MAX_TIES_PER_STEP, StepParity

__all__ = ["OutputParity", "call_bounds", "output_parities"]


@dataclass(frozen=True)
class OutputParity:
    """Agreement of one output in one call, and its bound.

    Attributes:
        output: name of the output.
        call: index of the call.
        row: the agreement.
        bound: the bound.
    """

    output: str
    call: int
    row: StepParity
    bound: Bound


def output_parities(
    calls: CallSet,
    expected: Sequence[Outputs],
    given: Sequence[Outputs],
    required: Mapping[str, float],
    flips: Flips,
    channels: int | None = None,
    *,
    whole: bool = False,
) -> list[OutputParity]:
    """Compare the outputs of both sides, call by call.

    Args:
        calls: the calls.
        expected: outputs of the reference in each call.
        given: outputs of the other side in each call.
        required: required SNR of each output, in dB.
        flips: how many images may have a flipped code.
        channels: number of entries of axis 1 to compare; None: all.
        whole: whether an output is one image without an axis of the batch.

    Returns:
        One entry per output and call, output by output.
    """
    moved = None if flips.moved is None else cache(flips.moved)
    parities: list[OutputParity] = []
    for output in [name for name in expected[0] if name in given[0]]:
        pairs = []
        for index, steps in enumerate(calls.steps):
            images = partial(
                _images, shape=expected[index][output].shape, channels=channels, whole=whole
            )

            def floor(pattern: int, call: int = index, images: Any = images) -> Tensor:
                assert moved is not None
                tensor: Tensor = images(moved(call, pattern)[output])  # noqa: B023
                return tensor

            reference, other = images(expected[index][output]), images(given[index][output])
            pairs.append(Pair(reference, other, steps, None if moved is None else floor))
        judged = agreements(pairs, required[output], flips, few=calls.few_images)
        for index, (row, bound) in enumerate(judged):
            full = replace(bound, channels=channels, steps=calls.steps[index], whole=whole)
            parities.append(OutputParity(output, index, row, full))
    return parities


def _images(
    array: np.ndarray, *, shape: Sequence[int], channels: int | None, whole: bool
) -> Tensor:
    """An output as a batch of images, float32 `[B, ...]`."""
    values = torch.from_numpy(np.array(array)).reshape(tuple(shape)).float()
    if whole:
        values = values[None]
    return values if channels is None else values[:, :channels]


def call_bounds(parities: Sequence[OutputParity], keys: Sequence[str]) -> dict[str, Any]:
    """The bounds as `trtq.comparison.image_snr.ImageSnr` takes them.

    Args:
        parities: agreement of every output in every call.
        keys: key of each call, see `trtq.comparison.image_snr.call_key`.
    """
    calls: dict[str, dict[str, Any]] = {key: {} for key in keys}
    for parity in parities:
        calls[keys[parity.call]][parity.output] = parity.bound.to_json()
    default = Bound(max(parity.bound.min_db for parity in parities), MAX_TIES_PER_STEP)
    return {"default": {"": default.to_json()}, "calls": calls}
