"""Step-level continuous batching: images at different denoising steps share one call of the denoiser.

The step index is computed inside the graph, from the timestep, for each row of a batch. So a call may
hold images at different steps, of different step counts, seeds and guidance: an image joins at the
next call and leaves when it is done. What an image becomes depends on no other: alone or beside others,
in a batch of the same size it is the same bit for bit.
Letters: B rows of a call; an image with guidance takes two, one without takes one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from trtq.serve.model import ServedModel, Start

__all__ = ["Batcher", "Batching", "Item", "Observer", "batch_sizes"]

logger = logging.getLogger(__name__)
Batching = Literal["step", "request"]


class Observer(Protocol):
    """Is told what a batcher does; called from its thread."""

    def called(self, seconds: float, rows: int, size: int) -> None:
        """One call of the denoiser: `rows` of images in a batch of `size`."""

    def waited(self, seconds: float) -> None:
        """An image was denoised for the first time, so long after it came."""


@dataclass(eq=False)
class Item:
    """One image under way.

    Attributes:
        start: what it begins with.
        index: its place in its request.
        after_step: called in the batcher's thread after each step but the last.
        done: called once, mostly in the batcher's thread, with None or with what went wrong; not called
            for an image that was cancelled.
        x: where it stands, `[1, ...]`.
        clean: the clean sample that the last prediction meant.
        position: calls of the denoiser so far.
        cancelled: nobody waits for it any more.
    """

    start: Start
    index: int
    after_step: Callable[[Item], None] | None
    done: Callable[[Item, Exception | None], None]
    x: np.ndarray = field(init=False)
    clean: np.ndarray = field(init=False)
    position: int = 0
    cancelled: bool = False
    order: float = 0.0
    came: float = 0.0

    def __post_init__(self) -> None:
        self.x = self.clean = self.start.x
        inputs = self.start.inputs
        both = inputs.unconditional is not None and self.start.guidance != 1
        self.rows = 2 if both else 1
        halves = [inputs.unconditional, inputs.conditional] if both else [inputs.conditional]
        self.halves = [half for half in halves if half is not None]
        # Only arrays of the same shapes can lie in one batch.
        arrays = [*inputs.conditional.items(), *inputs.shared.items()]
        self.kind = (self.x.shape, tuple((name, value.shape[1:]) for name, value in arrays))

    @property
    def steps(self) -> int:
        """Calls of the denoiser in all."""
        return len(self.start.solver.timesteps)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, and `most` itself."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)


class Batcher:
    """One thread that calls one model's denoiser.

    Images that came first are in every call until they are done. The images of one request come after
    each other: its image k counts as if it had come k images later, so a request for many does not keep
    one for a single image waiting, and none waits for ever.

    Args:
        model: what is called.
        most_rows: rows in one call, at least 2.
        sizes: the only batch sizes to call it with, ascending, smaller batches are padded; None: any.
        batching: `step`, or `request`: a batch begins together, all of it with the same number of steps
            and the same guidance, and nothing joins until it is done. This is how servers that call
            whole pipelines batch, and there to be compared with.
        observer: is told what happens.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        most_rows: int,
        sizes: Sequence[int] | None = None,
        batching: Batching = "step",
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.most_rows = most_rows
        self.sizes: list[int] | None = None if sizes is None else list(sizes)
        self.batching = batching
        self._observer = observer
        self._items: list[Item] = []
        self._batch: list[Item] = []
        self._wake = threading.Condition()
        self._closed: Exception | None = None
        self._calls = 0
        self._thread = threading.Thread(target=self._run, name=f"denoise-{model.card.name}")
        self._thread.daemon = True
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Take on the images of one request."""
        now = time.monotonic()
        with self._wake:
            closed = self._closed
            if closed is None:
                for item in items:
                    item.came = now
                    item.order = self._calls + item.index * item.steps
                self._items += items
                self._items.sort(key=lambda item: item.order)
                self._wake.notify()
                return
        for item in items:
            item.done(item, closed)

    def add_size(self, size: int) -> None:
        """Allow another batch size, once the model is ready for it."""
        assert self.sizes is not None
        with self._wake:
            self.sizes = sorted({*self.sizes, size})

    def refuse(self, error: Exception) -> None:
        """Give up all images, and those that still come; the call that is running is still finished."""
        with self._wake:
            self._closed = error
            self._wake.notify()
            given_up = [item for item in self._items if not item.cancelled]
            self._items, self._batch = [], []
            for item in given_up:
                item.cancelled = True
        for item in given_up:
            item.done(item, error)

    def close(self, error: Exception) -> None:
        """The same, and wait for the end of the thread."""
        self.refuse(error)
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (chosen := self._choose()) and self._closed is None:
                    self._wake.wait()
                if self._closed is not None:
                    return
            try:
                self._call(chosen)
            except Exception as error:
                # Whatever the engine threw is the answer to these images; the thread has to live on.
                logger.exception("a call of the denoiser failed")
                self._finish(chosen, error)

    def _choose(self) -> list[Item]:
        """The images of the next call; cancelled ones are dropped."""
        if any(item.cancelled for item in self._items):
            self._drop(item for item in self._items if item.cancelled)
        if self.batching == "step":
            return self._fill(self._items, lambda item, first: item.kind == first.kind)
        if not self._batch:
            self._batch = self._fill(self._items, _same_call)
        return self._batch

    def _fill(self, items: list[Item], fits: Callable[[Item, Item], bool]) -> list[Item]:
        most = self.most_rows if self.sizes is None else min(self.most_rows, self.sizes[-1])
        chosen: list[Item] = []
        rows = 0
        for item in items:
            if rows == most:
                break
            if rows + item.rows <= most and (not chosen or fits(item, chosen[0])):
                chosen.append(item)
                rows += item.rows
        return chosen

    def _drop(self, items: Iterable[Item]) -> None:
        gone = set(items)
        self._items = [item for item in self._items if item not in gone]
        self._batch = [item for item in self._batch if item not in gone]

    def _call(self, chosen: list[Item]) -> None:
        begun = time.monotonic()
        rows = sum(item.rows for item in chosen)
        size = rows
        if self.sizes is not None:
            size = next(size for size in self.sizes if size >= rows)
        predicted = self._predict(chosen, size - rows)
        first = 0
        for item in chosen:
            own = predicted[first : first + item.rows, : item.x.shape[1]]
            first += item.rows
            if item.rows == 2:
                without, with_condition = own[:1], own[1:]
                own = without + item.start.guidance * (with_condition - without)
            item.x, item.clean = item.start.solver.step(item.x, own, item.position)
            item.position += 1
        self._calls += 1
        if self._observer is not None:
            self._observer.called(time.monotonic() - begun, rows, size)
            for item in chosen:
                if item.position == 1:
                    self._observer.waited(begun - item.came)
        self._finish([item for item in chosen if item.position == item.steps], None)
        for item in chosen:
            if item.after_step is not None and item.position < item.steps and not item.cancelled:
                item.after_step(item)

    def _predict(self, chosen: list[Item], padding: int) -> np.ndarray:
        """The denoiser's output, row by row; images in order, "no condition" first, then padding."""
        samples, timesteps, halves = [], [], []
        for item in chosen:
            solver = item.start.solver
            samples += [solver.scaled(item.x, item.position)] * item.rows
            timesteps += [solver.timesteps[item.position]] * item.rows
            halves += item.halves
        samples += samples[-1:] * padding
        timesteps += timesteps[-1:] * padding
        halves += halves[-1:] * padding
        conditional = {
            name: np.concatenate([half[name] for half in halves])
            for name in chosen[0].start.inputs.conditional
        }
        shared = chosen[0].start.inputs.shared
        x = np.concatenate(samples) if len(samples) > 1 else samples[0]
        return self.model.denoise(x, np.array(timesteps, np.float32), conditional, shared)

    def _finish(self, items: Sequence[Item], error: Exception | None) -> None:
        with self._wake:
            alive = [item for item in items if not item.cancelled]
            self._drop(items)
        for item in alive:
            item.done(item, error)


def _same_call(item: Item, first: Item) -> bool:
    """Whether a pipeline could draw both in one call."""
    return (
        item.kind == first.kind
        and item.steps == first.steps
        and item.rows == first.rows
        and item.start.guidance == first.start.guidance
    )
