"""Comparison of the exported graph with torch at every calibrated step.

Float sums differ in their last bits between runtimes, and a value within those bits of a rounding tie is
rounded to the other code (a code "flips"). In a 4-bit network the flipped code changes the whole output
of its image, while all other images agree to the last bits or exactly. Images with a flipped code are
rare and are set aside; an error of the export would change every image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.sampling import Conditions, predict, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import NonFiniteError
from trtq.exporter.last_bits import last_bit_moved
from trtq.snr import EXACT_DB, snr_db

__all__ = [
    "FLOOR_MARGIN_DB",
    "MAX_TIES",
    "MAX_TIES_ANYWHERE",
    "MAX_TIES_PER_STEP",
    "TIE_DB",
    "StepParity",
    "compare",
    "each_db",
    "may_flip",
    "mixed_items",
    "noise_parity",
    "overall",
    "step_parity",
    "worst_step",
]

TIE_DB = 60.0
"""Minimum SNR, in dB, of an image without a flipped code; such images agree to 100 dB or more."""
MAX_TIES = 0.05
"""Maximum share of images, over all steps, that may be set aside. Chosen by hand."""
MAX_TIES_PER_STEP = 0.15
"""Maximum share at one step, larger because a few images more or fewer fall on a tie by chance. Chosen
by hand: with 128 images and a true share of 0.05 the standard deviation is sqrt(0.05 * 0.95 / 128) =
0.019, so this is five standard deviations above `MAX_TIES`."""
MAX_TIES_ANYWHERE = 0.4
"""Maximum share for networks that flip many codes by themselves. Chosen by hand, below one half, so that
the majority of the images is always compared."""
_TIES_MARGIN = 1.5
"""Allowed ratio of flipped images to those that flip in the reference. Chosen by hand: the floor is
measured with one pattern of last bits, and another runtime's pattern flips other images."""
FLOOR_MARGIN_DB = 6.0
"""Allowed distance below the floor: 20 log10(2) = 6.02 dB, twice the floor's noise amplitude. Chosen by
hand, since the floor is measured with one pattern of last bits only."""
MIN_ITEMS = 3
"""Minimum number of items at one step of a mixed batch for a majority that differs to be an error.
Chosen by hand: ties are rare, so that two of three items with a tie are no coincidence."""


@dataclass(frozen=True)
class StepParity:
    """Agreement of two predictions of the noise in the same images.

    Attributes:
        db: SNR in dB over the images without a flipped code; over all images if more images have a
            flipped code than may be set aside. The limits are `MAX_TIES_PER_STEP` and, over all steps,
            `MAX_TIES`; or `_TIES_MARGIN` times the share that flips in the reference when its last bits
            change, but never more than `MAX_TIES_ANYWHERE`.
        pooled_db: SNR in dB over all images.
        ties: share of images set aside.
        floor_db: SNR in dB, over all images, of the reference against itself with the inputs of its
            low-bit layers changed by about the last bit, which is how much the norms and activation
            functions of runtimes differ. No runtime can be expected to agree better. Measured only if
            `pooled_db` is below `TIE_DB`; `EXACT_DB` otherwise.
        floor_ties: share of images in which a code flips in that measurement.
    """

    db: float
    pooled_db: float
    ties: float
    floor_db: float = EXACT_DB
    floor_ties: float = 0.0

    def holds(self, min_db: float) -> bool:
        """Whether the SNR reaches `min_db`, or comes close to the floor."""
        return self.db >= min(min_db, self.floor_db - FLOOR_MARGIN_DB)


def compare(
    reference: Tensor,
    other: Tensor,
    moved: Tensor | None = None,
    usual: float = MAX_TIES_PER_STEP,
) -> StepParity:
    """Compare two noise predictions `[B, ...]` image by image.

    Args:
        reference: the expected prediction.
        other: the prediction to check.
        moved: the prediction of the reference with changed last bits, for the floor; None: no floor.
        usual: share of images that may be set aside if fewer flip in the floor.

    Returns:
        The agreement of the predictions.
    """
    same = each_db(reference, other) >= TIE_DB
    ties = 1 - float(same.float().mean())
    pooled = snr_db(reference, other)
    row = StepParity(pooled, pooled, 0.0)
    if moved is not None:
        floor_ties = float((each_db(reference, moved) < TIE_DB).float().mean())
        row = replace(row, floor_db=snr_db(reference, moved), floor_ties=floor_ties)
    if ties > may_flip(usual, row.floor_ties):
        return row
    return replace(row, db=snr_db(reference[same], other[same]), ties=ties)


def each_db(reference: Tensor, other: Tensor) -> Tensor:
    """SNR of every image, in dB, `[B]`."""
    return torch.tensor([snr_db(a, b) for a, b in zip(reference, other, strict=True)])


def may_flip(usual: float, floor: float) -> float:
    """Share of images that may be set aside: `usual`, or more if a share `floor` flips by itself."""
    return min(max(usual, _TIES_MARGIN * floor), MAX_TIES_ANYWHERE)


def step_parity(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
) -> list[StepParity]:
    """Compare predictions at every step of the reference's trajectory.

    One further batch mixes the steps: each item is at another step.

    Args:
        reference: the torch denoiser.
        exported: the same denoiser, run by the exported graph.
        schedule: the calibrated steps.
        noise: start of the trajectories, `[B,C,H,W]`.
        conditions: conditions of the B images.

    Returns:
        One row per step, cleanest first, and then the row of the mixed batch.

    Raises:
        NonFiniteError: the graph returns NaN or infinity.
    """
    rows = []
    position, image = mixed_items(len(noise), len(schedule))
    mixed = torch.empty(len(position), *noise.shape[1:], dtype=noise.dtype)
    for point in walk(reference, schedule, noise, conditions):
        here = position == point.position
        mixed[here] = point.x[image[here]]
        other = _exported_at(exported, point.x, point.timestep, conditions)
        rows.append(
            _with_floor(reference, point.x, point.timestep, conditions, point.predicted, other)
        )
    rows.reverse()
    together = _mixed(reference, exported, mixed, position, schedule, conditions.take(image))
    return overall([*rows, together])


def mixed_items(count: int, steps: int) -> tuple[Tensor, Tensor]:
    """The batch in which each item is at another step.

    Args:
        count: number of images.
        steps: number of steps.

    Returns:
        Index of the step, 0 = noisiest, and index of the image, int64 `[items]` each. There are several
        steps even for a single image.
    """
    items = torch.arange(max(count, min(steps, MIN_ITEMS + 1)))
    return items * steps // len(items), items % count


def overall(rows: list[StepParity], usual: float = MAX_TIES) -> list[StepParity]:
    """The rows over all images if more images were set aside, over all rows, than is allowed.

    Args:
        rows: the rows.
        usual: share of images that may be set aside if fewer flip in the floor.
    """
    floor = sum(row.floor_ties for row in rows) / len(rows)
    if sum(row.ties for row in rows) > may_flip(usual, floor) * len(rows):
        return [replace(row, db=row.pooled_db, ties=0.0) for row in rows]
    return rows


def noise_parity(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
) -> list[StepParity]:
    """Compare predictions at the middle step only, for the noise itself as input.

    The arguments are those of `step_parity`.

    Returns:
        One row.
    """
    position = torch.full((len(noise),), len(schedule) // 2)
    return [_mixed(reference, exported, noise, position, schedule, conditions)]


def _exported_at(
    exported: Callable[..., Any], x: Tensor, timestep: Tensor | float, conditions: Conditions
) -> Tensor:
    prediction = predict(exported, x, timestep, conditions)
    if not bool(torch.isfinite(prediction).all()):
        raise NonFiniteError(f"the graph gives NaN or infinity at timestep {timestep}")
    return prediction


@torch.no_grad()
def _with_floor(
    reference: Callable[..., Any],
    x: Tensor,
    timestep: Tensor | float,
    conditions: Conditions,
    predicted: Tensor,
    other: Tensor,
) -> StepParity:
    """`compare(predicted, other)`, with the floor unless they agree to the last bits."""
    row = compare(predicted, other)
    if row.pooled_db >= TIE_DB:
        return row
    with last_bit_moved(reference):
        moved = predict(reference, x, timestep, conditions)
    return compare(predicted, other, moved)


@torch.no_grad()
def _mixed(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    x: Tensor,
    position: Tensor,
    schedule: NoiseSchedule,
    conditions: Conditions,
) -> StepParity:
    """Compare one batch in which item i is at the step `position[i]`."""
    timesteps = schedule.timesteps[position]
    together = predict(reference, x, timesteps, conditions)
    other = _exported_at(exported, x, timesteps, conditions)
    row = _with_floor(reference, x, timesteps, conditions, together, other)
    return worst_step(row, together, other, position)


def worst_step(
    row: StepParity, reference: Tensor, other: Tensor, position: Tensor, usual: float = 0.5
) -> StepParity:
    """The row of a mixed batch; that of a step at which the majority differs, if there is one.

    A wrong look-up changes all items of a step; ties change single items.

    Args:
        row: the row of all items.
        reference: the expected prediction, `[B, ...]`.
        other: the prediction to check, `[B, ...]`.
        position: index of each item's step, `[B]`.
        usual: share of the items of a step that may differ.
    """
    each = each_db(reference, other)
    for step in sorted(set(position.tolist())):
        at = position == step
        if int(at.sum()) >= MIN_ITEMS and float((each[at] < TIE_DB).float().mean()) > usual:
            worst = snr_db(reference[at], other[at])
            row = replace(row, db=worst, pooled_db=worst, ties=0.0)
    return row
