"""Agreement of outputs call by call, and the bounds that polygraphy checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtq.comparison.calls import DenoiserCalls
from trtq.exporter.parity import (
    FLOOR_MARGIN_DB,
    MAX_TIES,
    MAX_TIES_PER_STEP,
    TIE_DB,
    StepParity,
    compare,
    may_flip,
    overall,
    worst_step,
)

__all__ = ["Bound", "Flips", "OutputParity", "call_bounds", "output_parities"]

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Flips:
    """How many images may have a flipped code.

    Attributes:
        moved: function from the index of a call to the reference's outputs, with the inputs of its
            low-bit layers changed by their last bits; None: it cannot be measured.
        per_call: share of images of one call that may be set aside if fewer flip in the measurement.
        overall: the same over all calls.
    """

    moved: Callable[[int], Outputs] | None = None
    per_call: float = MAX_TIES_PER_STEP
    overall: float = MAX_TIES


@dataclass(frozen=True)
class Bound:
    """The bound of one output in one call, see `trtq.comparison.image_snr.ImageSnr`.

    Attributes:
        min_db: required SNR, in dB.
        max_ties: share of images that may be set aside; negative: none.
        channels: number of entries of axis 1 that are compared; None: all.
        steps: index of the step of each image; None: all are at one step.
    """

    min_db: float
    max_ties: float
    channels: int | None = None
    steps: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The bound as `ImageSnr` takes it."""
        return {
            "min_db": self.min_db,
            "max_ties": self.max_ties,
            "channels": self.channels,
            "steps": self.steps,
        }


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
    calls: DenoiserCalls,
    expected: Sequence[Outputs],
    given: Sequence[Outputs],
    required: Mapping[str, float],
    flips: Flips,
    channels: int | None = None,
) -> list[OutputParity]:
    """Compare the outputs of both sides, call by call.

    Args:
        calls: the calls.
        expected: outputs of the reference in each call.
        given: outputs of the other side in each call.
        required: required SNR of each output, in dB.
        flips: how many images may have a flipped code.
        channels: number of entries of axis 1 to compare; None: all.

    Returns:
        One entry per output and call, output by output.
    """
    parities: list[OutputParity] = []
    floors: dict[int, Outputs] = {}
    for output in [name for name in expected[0] if name in given[0]]:
        rows = []
        for index, steps in enumerate(calls.steps):
            reference, other = (
                _comparable(values[index][output], expected[index][output].shape, channels)
                for values in (expected, given)
            )
            row = compare(reference, other, None, flips.per_call)
            if row.pooled_db < TIE_DB and flips.moved is not None:
                if index not in floors:
                    floors[index] = flips.moved(index)
                floor = _comparable(floors[index][output], expected[index][output].shape, channels)
                row = compare(reference, other, floor, flips.per_call)
            if steps is not None:
                row = worst_step(row, reference, other, torch.tensor(steps))
            rows.append(row)
        pooled = overall(rows, flips.overall)
        for index, (row, before) in enumerate(zip(pooled, rows, strict=True)):
            set_aside = row.ties > 0 or (before.ties == 0 and row.db == before.db)
            limit = may_flip(flips.per_call, row.floor_ties) if set_aside else -1.0
            bound = Bound(
                min(required[output], row.floor_db - FLOOR_MARGIN_DB),
                limit,
                channels,
                calls.steps[index],
            )
            parities.append(OutputParity(output, index, row, bound))
    return parities


def _comparable(array: np.ndarray, shape: Sequence[int], channels: int | None) -> torch.Tensor:
    values = torch.from_numpy(np.array(array)).reshape(tuple(shape)).float()
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
