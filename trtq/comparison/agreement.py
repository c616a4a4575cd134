"""Agreement of one output of two sides in every call: which images may be set aside, and the bound.

Runtimes that compute norms in float64 flip codes in few images, see `trtq.exporter.parity`. A runtime
that sums them in float32 flips codes in a large share of the images of a 4-bit network, so that an SNR
over all images says nothing about the graph: a wrong scale changes it less than the flips do. But flips
change some images and leave the others as they are, and an error of the graph changes all of them. So
the share of changed images is compared with the share that changes in torch by other last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from trtq.comparison.call_set import Outputs
from trtq.exporter.call_parity import tensor_parity
from trtq.exporter.parity import (
    FLOOR_MARGIN_DB,
    MAX_TIES,
    MAX_TIES_PER_STEP,
    TIE_DB,
    StepParity,
    each_db,
    may_flip,
    overall,
    worst_step,
)
from trtq.snr import EXACT_DB, snr_db

__all__ = ["FLIPS_MARGIN", "Bound", "Flips", "Pair", "agreements", "likely_max"]

FLIPS_MARGIN = 6.0
"""Allowed ratio of the number of flips to the number that the measured last bits of a runtime cause in
torch. In a low-bit graph a runtime fuses other operators than in the float graph of that measurement.
Chosen by hand. On 2026-12-01 OpenVINO flipped codes in 23 % of the images of the digits UNet and in 47 %
of those of the digits transformer, and the measured last bits in 16 and 13 %: 1.5 and 4.7 times as many
flips (W4A4, 5 calls of 32 images)."""
_CHANCE = 1e-5
"""Probability with which more images than allowed change by chance in one call of a right graph. Chosen
by hand: a comparison of all layers has some hundreds of calls."""


@dataclass(frozen=True)
class Flips:
    """How many images may have a flipped code.

    Attributes:
        moved: function from the index of a call and the number of a pattern to the reference's outputs,
            with the inputs of its low-bit layers changed by their last bits; None: it cannot be
            measured.
        patterns: number of patterns.
        plain: number of the first patterns, whose last bits are those of the runtime; the others are
            larger by `FLIPS_MARGIN` and count for the floor only.
        by_share: whether the share of changed images is judged, and not the SNR over all images.
        per_call: share of images of one call that may be set aside if fewer flip in the measurement.
        overall: the same over all calls.
    """

    moved: Callable[[int, int], Outputs] | None = None
    patterns: int = 1
    plain: int = 1
    by_share: bool = False
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
        step_ties: share of the images of one step of a mixed call that may differ.
        whole: whether the output is one image without an axis of the batch.
    """

    min_db: float
    max_ties: float
    channels: int | None = None
    steps: list[int] | None = None
    step_ties: float = 0.5
    whole: bool = False

    def to_json(self) -> dict[str, Any]:
        """The bound as `ImageSnr` takes it."""
        return {
            "min_db": self.min_db,
            "max_ties": self.max_ties,
            "channels": self.channels,
            "steps": self.steps,
            "step_ties": self.step_ties,
            "whole": self.whole,
        }


@dataclass(frozen=True)
class Pair:
    """One output of both sides in one call.

    Attributes:
        reference: the expected output, float32 `[B, ...]`.
        other: the output to check.
        steps: index of the step of each image of a mixed call; None: one step.
        floor: function from the number of a pattern to the expected output with changed last bits; None:
            it cannot be measured.
    """

    reference: Tensor
    other: Tensor
    steps: list[int] | None
    floor: Callable[[int], Tensor] | None


def agreements(
    pairs: Sequence[Pair], required: float, flips: Flips, *, few: bool
) -> list[tuple[StepParity, Bound]]:
    """The agreement of one output in every call, and its bound.

    Args:
        pairs: the output of both sides in each call.
        required: required SNR, in dB.
        flips: how many images may have a flipped code.
        few: see `CallSet.few_images`.
    """
    if flips.by_share and flips.moved is not None:
        return _by_share(pairs, required, flips)
    return _rare(pairs, required, flips, few=few)


def _rare(
    pairs: Sequence[Pair], required: float, flips: Flips, *, few: bool
) -> list[tuple[StepParity, Bound]]:
    """The agreement by the rules of the parity after an export."""
    rows = []
    for pair in pairs:
        floor = pair.floor
        floors = () if floor is None else (floor(index) for index in range(flips.patterns))
        row = tensor_parity(pair.reference, pair.other, floors, flips.per_call, few=few)
        if pair.steps is not None:
            row = worst_step(row, pair.reference, pair.other, torch.tensor(pair.steps))
        rows.append(row)
    judged = []
    for row, before in zip(overall(rows, flips.overall), rows, strict=True):
        set_aside = row.ties > 0 or (before.ties == 0 and row.db == before.db)
        limit = max(may_flip(flips.per_call, row.floor_ties), row.ties) if set_aside else -1.0
        judged.append((row, Bound(min(required, row.floor_db - FLOOR_MARGIN_DB), limit)))
    return judged


@dataclass(frozen=True)
class _Shares:
    """Changed images of one call.

    Attributes:
        changed: whether each image changed, bool `[B]`.
        row: the agreement over all images, with the floor.
    """

    changed: Tensor
    row: StepParity

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.changed)

    @property
    def count(self) -> int:
        """Number of changed images."""
        return int(self.changed.sum())


def _shares(pair: Pair, flips: Flips) -> _Shares:
    pooled = snr_db(pair.reference, pair.other)
    row = StepParity(pooled, pooled, 0.0)
    changed = each_db(pair.reference, pair.other) < TIE_DB
    if pooled < TIE_DB and pair.floor is not None:
        floor_db, flipped = EXACT_DB, 0
        for pattern in range(flips.patterns):
            moved = pair.floor(pattern)
            floor_db = min(floor_db, snr_db(pair.reference, moved))
            if pattern < flips.plain:
                flipped += int((each_db(pair.reference, moved) < TIE_DB).sum())
        # One more than counted, since few images may have no flip by chance.
        share = min(1.0, (flipped + 1) / (flips.plain * len(changed)))
        row = replace(row, floor_db=floor_db, floor_ties=share)
    return _Shares(changed, row)


def _by_share(
    pairs: Sequence[Pair], required: float, flips: Flips
) -> list[tuple[StepParity, Bound]]:
    """The agreement if codes flip in a measured share of the images."""
    shares = [_shares(pair, flips) for pair in pairs]
    mean = fmean([each.row.floor_ties for each in shares], [each.images for each in shares])
    chances = [_expected(max(mean, each.row.floor_ties)) for each in shares]
    usual = [
        each
        for each, chance in zip(shares, chances, strict=True)
        if each.count <= likely_max(each.images, chance)
    ]
    images = sum(each.images for each in usual)
    allowed = likely_max(images, _expected(mean))
    many, enough = sum(each.count for each in usual) > allowed, allowed < images
    judged = []
    for pair, each, chance in zip(pairs, shares, chances, strict=True):
        row, bound = _share_of_call(pair, each, required, chance, many=many, enough=enough)
        if pair.steps is not None:
            of_step = _usual_of_steps(pair.steps, chance)
            position = torch.tensor(pair.steps)
            row = worst_step(row, pair.reference, pair.other, position, of_step)
            bound = replace(bound, step_ties=of_step)
        judged.append((row, bound))
    return judged


def _expected(share: float) -> float:
    """Probability that an image changes in a right graph, with a margin.

    Flips are independent, so that an image without a flip has the probability `exp(-flips)`.
    """
    without = float((1 - share) ** FLIPS_MARGIN)
    return max(MAX_TIES_PER_STEP, 1 - without)


def _share_of_call(
    pair: Pair, each: _Shares, required: float, chance: float, *, many: bool, enough: bool
) -> tuple[StepParity, Bound]:
    """The agreement in one call.

    Args:
        pair: the output in this call.
        each: its changed images.
        required: required SNR, in dB.
        chance: probability that an image changes in a right graph.
        many: whether more images changed, over all calls, than flips explain.
        enough: whether all calls together have enough images to tell.
    """
    count, row = each.count, each.row
    allowed = likely_max(each.images, chance)
    if many or allowed < count:
        # More images changed than flips explain.
        return row, Bound(required, -1.0)
    if allowed == each.images:
        # With few images, or many flips, every image of this call may change by chance.
        if not enough or count == each.images:
            return row, Bound(min(required, row.floor_db - FLOOR_MARGIN_DB), -1.0)
        allowed = each.images - 1
    kept = ~each.changed
    db = snr_db(pair.reference[kept], pair.other[kept])
    row = replace(row, db=db, ties=count / each.images)
    return row, Bound(required, allowed / each.images)


def _usual_of_steps(steps: list[int], chance: float) -> float:
    """Share of the images of one step of a mixed call that may change."""
    counts = [steps.count(step) for step in set(steps)]
    return max(likely_max(count, chance) / count for count in counts)


def likely_max(count: int, chance: float) -> int:
    """The smallest number that a binomial variable exceeds with a probability below `_CHANCE`.

    Args:
        count: number of trials.
        chance: probability of each.
    """
    if chance >= 1:
        return count
    above, number = 0.0, count
    while number > 0:
        above += math.exp(
            math.lgamma(count + 1)
            - math.lgamma(number + 1)
            - math.lgamma(count - number + 1)
            + number * math.log(chance)
            + (count - number) * math.log1p(-chance)
        )
        if above >= _CHANCE:
            return number
        number -= 1
    return number
