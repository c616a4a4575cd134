"""Images in progress, and the batches in which they share denoiser calls.

Letters: B rows of a call; an image with guidance takes two rows, an image without guidance one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtq.serve.models.base import ImageModel, InitialState
from trtq.serve.models.samples import Samples, beside, joined

__all__ = ["Batch", "Item"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Item:
    """One image in progress.

    Attributes:
        start: the image before its first denoising step.
        index: index of the image in its request.
        on_step: called in the batcher's thread after each denoising step except the last.
        on_done: called once with None or with the error, usually in the batcher's thread; not called for
            a cancelled image.
        x: the current sample, `[1, ...]`.
        clean: the clean sample that the last prediction implies, `[1, ...]`.
        position: number of completed denoiser calls.
        cancelled: whether the client no longer waits for the image.
        order: position in the queue.
        queued_at: `time.monotonic()` at which the batcher received the image.
        rows: number of rows per denoiser call, 2 with guidance, else 1.
        halves: the inputs of each row, unconditional before conditional.
        kind: shapes of the image's arrays; images of the same kind can share a batch.
    """

    start: InitialState
    index: int
    on_step: Callable[[Item], None] | None
    on_done: Callable[[Item, Exception | None], None]
    x: Samples = field(init=False)
    clean: Samples = field(init=False)
    position: int = 0
    cancelled: bool = False
    order: float = 0.0
    queued_at: float = 0.0

    def __post_init__(self) -> None:
        self.x = self.clean = self.start.x
        inputs = self.start.inputs
        both = inputs.unconditional is not None and self.start.guidance != 1
        self.rows = 2 if both else 1
        halves = [inputs.unconditional, inputs.conditional] if both else [inputs.conditional]
        self.halves = [half for half in halves if half is not None]
        arrays = [*inputs.conditional.items(), *inputs.shared.items()]
        self.kind = (
            tuple(self.x.shape),
            tuple((name, tuple(value.shape[1:])) for name, value in arrays),
        )

    @property
    def steps(self) -> int:
        """Total number of denoiser calls."""
        return len(self.start.solver.timesteps)

    def finish(self, error: Exception | None) -> None:
        """Call `on_done`, unless the image is cancelled."""
        if self.cancelled:
            return
        try:
            self.on_done(self, error)
        except Exception:  # The batcher still has other images to draw.
            logger.exception("an image could not be answered")


class Batch:
    """Images that share denoiser calls until an image joins or leaves.

    Inputs that are the same in every call are concatenated once.

    Args:
        items: the images, all of the same kind.
        size: number of rows per call; the rows beyond those of the images repeat the last row.

    Attributes:
        remaining: number of calls until the first of the images is complete.
        new: the images that have not been in a call yet.
        watched: the images that have an `on_step` callback.
    """

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items = items
        self.size = size
        self.rows = sum(item.rows for item in items)
        self.remaining = min(item.steps - item.position for item in items)
        self.new = [item for item in items if item.position == 0]
        self.watched = [item for item in items if item.on_step is not None]
        padding = size - self.rows
        halves = [half for item in items for half in item.halves]
        halves += halves[-1:] * padding
        inputs = items[0].start.inputs
        self._conditional = {
            name: joined([half[name] for half in halves]) for name in inputs.conditional
        }
        self._shared = inputs.shared
        # Index of the image of each row: unconditional rows, then conditional rows, then padding.
        image_of_row = [place for place, item in enumerate(items) for _ in range(item.rows)]
        self._image_of_row = [*image_of_row, *image_of_row[-1:] * padding]
        self._timesteps = self._remaining_timesteps()

    def _remaining_timesteps(self) -> Samples:
        """The timesteps of all calls until the first image is complete, float32[remaining, size]."""
        timesteps = [
            item.start.solver.timesteps[item.position : item.position + self.remaining]
            for item in self.items
        ]
        rows = np.array(timesteps, np.float32).T[:, self._image_of_row]
        return beside(rows, self.items[0].x)

    def step(self, model: ImageModel) -> None:
        """Run one denoising step for each image, in one call of the denoiser."""
        x = joined([item.start.solver.scaled(item.x, item.position) for item in self.items])
        if len(x) != self.size:
            x = x[self._image_of_row]
        timesteps = self._timesteps[-self.remaining]
        predictions = model.denoise(x, timesteps, self._conditional, self._shared)
        first = 0
        for item in self.items:
            predicted = predictions[first : first + item.rows, : item.x.shape[1]]
            first += item.rows
            if item.rows == 2:
                unconditional, conditional = predicted[:1], predicted[1:]
                predicted = unconditional + item.start.guidance * (conditional - unconditional)
            item.x, item.clean = item.start.solver.step(item.x, predicted, item.position)
            item.position += 1
        self.remaining -= 1
