"""Does the exported graph say what torch says? Compared at every calibrated step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.sampling import Conditions, predict, walk
from trtq.diffusion.schedule import NoiseSchedule
from trtq.errors import NonFiniteError
from trtq.quant.deployed import DeployedLayer, DeployedProduct
from trtq.snr import EXACT_DB, snr_db

__all__ = ["MAX_TIES", "StepParity", "compare", "noise_parity", "step_parity"]

TIE_DB = 60.0
"""Images nearer than this hold no flipped code; without one they agree to 100 dB or more."""
MAX_TIES = 0.05
"""Share of images with a flipped code, over all steps, that may be set aside."""
MAX_TIES_PER_STEP = 0.15
"""The same of one step: of 128 images a few more or less fall on a tie by chance."""
_MAX_TIES_EVER = 0.4
_LAST_BIT = 2.0**-22
_FLOOR_MARGIN_DB = 6.0
MIN_ITEMS = 3
"""Items of one step in a mixed batch from which on most of them being off is no coincidence."""


@dataclass(frozen=True)
class StepParity:
    """How near two predictions of the same images are.

    Float sums differ in their last bits between runtimes, and a value within those bits of a rounding
    tie lands on the other code. In a 4-bit network that one code carries through to the output of its
    image, while all other images agree to the last bits or exactly. Such images are rare, and set
    aside; an error of the export would touch every image.

    Attributes:
        db: SNR over the images without a flipped code, or over all of them when those with one are
            more than may be set aside: `MAX_TIES_PER_STEP`, and `MAX_TIES` over all steps, or half
            as many again as flip in the reference when its last bits move, two fifths at most.
        pooled_db: SNR over all images.
        ties: share of images set aside.
        floor_db: SNR over all images of the reference against itself, with what enters its low-bit
            layers moved by about the last bit: as much as another runtime's norms and activation
            functions differ. Where a network carries that far, no runtime can be nearer. Only
            measured where `pooled_db` is below `TIE_DB`; `EXACT_DB` elsewhere.
        floor_ties: share of images in which a code flips in that measurement.
    """

    db: float
    pooled_db: float
    ties: float
    floor_db: float = EXACT_DB
    floor_ties: float = 0.0

    def holds(self, min_db: float) -> bool:
        """Whether it is near enough: `min_db`, or as near as the reference is to itself."""
        return self.db >= min(min_db, self.floor_db - _FLOOR_MARGIN_DB)


def compare(reference: Tensor, other: Tensor, moved: Tensor | None = None) -> StepParity:
    """Compare two predictions `[B, ...]` image by image.

    Args:
        reference: what it should be.
        other: what it is.
        moved: the reference with its last bits moved, for the floor.
    """
    same = _each_db(reference, other) >= TIE_DB
    ties = 1 - float(same.float().mean())
    pooled = snr_db(reference, other)
    row = StepParity(pooled, pooled, 0.0)
    if moved is not None:
        floor_ties = float((_each_db(reference, moved) < TIE_DB).float().mean())
        row = replace(row, floor_db=snr_db(reference, moved), floor_ties=floor_ties)
    if ties > _may_flip(MAX_TIES_PER_STEP, row.floor_ties):
        return row
    return replace(row, db=snr_db(reference[same], other[same]), ties=ties)


def _each_db(reference: Tensor, other: Tensor) -> Tensor:
    return torch.tensor([snr_db(a, b) for a, b in zip(reference, other, strict=True)])


def _may_flip(usual: float, floor: float) -> float:
    """Share of images that may be set aside, where the reference itself has `floor`."""
    return min(max(usual, 1.5 * floor), _MAX_TIES_EVER)


def step_parity(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
) -> list[StepParity]:
    """Compare at every step of the reference's trajectory, cleanest first.

    Beyond each single step, one batch in which every item stands at another step is compared too;
    it is the last of the list.

    Args:
        reference: the torch denoiser.
        exported: the same, from the graph.
        schedule: the calibrated steps.
        noise: where the trajectories start, `[B,C,H,W]`.
        conditions: of the B images.

    Raises:
        NonFiniteError: the graph gives NaN or infinity.
    """
    rows = []
    count, steps = len(noise), len(schedule)
    # At least a few steps side by side, even of a single image.
    items = torch.arange(max(count, min(steps, MIN_ITEMS + 1)))
    position, image = items * steps // len(items), items % count
    mixed = torch.empty(len(items), *noise.shape[1:], dtype=noise.dtype)
    for point in walk(reference, schedule, noise, conditions):
        here = position == point.position
        mixed[here] = point.x[image[here]]
        other = _exported_at(exported, point.x, point.timestep, conditions)
        rows.append(
            _with_floor(reference, point.x, point.timestep, conditions, point.predicted, other)
        )
    rows.reverse()
    together = _mixed(reference, exported, mixed, position, schedule, conditions.take(image))
    rows.append(together)
    usual = sum(row.floor_ties for row in rows) / len(rows)
    if sum(row.ties for row in rows) > _may_flip(MAX_TIES, usual) * len(rows):
        return [replace(row, db=row.pooled_db, ties=0.0) for row in rows]
    return rows


def noise_parity(
    reference: Callable[..., Any],
    exported: Callable[..., Any],
    schedule: NoiseSchedule,
    noise: Tensor,
    conditions: Conditions,
) -> list[StepParity]:
    """Compare at the middle step alone, at the noise itself.

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
    """`compare(predicted, other)`, with the floor where they are not equal to the last bits."""
    row = compare(predicted, other)
    if row.pooled_db >= TIE_DB:
        return row
    with _last_bit_moved(reference):
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
    """One batch in which item i stands at the step `position[i]`."""
    timesteps = schedule.timesteps[position]
    together = predict(reference, x, timesteps, conditions)
    other = _exported_at(exported, x, timesteps, conditions)
    row = _with_floor(reference, x, timesteps, conditions, together, other)
    each = _each_db(together, other)
    for step in range(len(schedule)):
        at = position == step
        # Items that look up a wrong step are all of their step's; ties are here and there.
        if int(at.sum()) >= MIN_ITEMS and float((each[at] < TIE_DB).float().mean()) > 0.5:
            worst = snr_db(together[at], other[at])
            row = replace(row, db=worst, pooled_db=worst, ties=0.0)
    return row


@contextmanager
def _last_bit_moved(reference: Any) -> Iterator[None]:
    """Inside the block, every value that enters a low-bit layer is a little larger or smaller."""

    def move(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moved = []
        for x in inputs:
            signs = torch.ones(x.numel(), device=x.device)
            signs[::2] = -1
            moved.append(x * (1 + _LAST_BIT * signs.reshape(x.shape)))
        return tuple(moved)

    layers = [
        module
        for module in (reference.modules() if isinstance(reference, nn.Module) else ())
        if isinstance(module, DeployedLayer | DeployedProduct)
    ]
    handles = [layer.register_forward_pre_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
