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

from trtq.serve.models.base import ImageModel, InitialState

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
        after_update: called in the batcher's thread after each step but the last.
        done: called once, mostly in the batcher's thread, with None or with what went wrong; not called
            for an image that was cancelled.
        x: where it stands, `[1, ...]`.
        clean: the clean sample that the last prediction meant.
        position: calls of the denoiser so far.
        cancelled: nobody waits for it any more.
    """

    start: InitialState
    index: int
    after_update: Callable[[Item], None] | None
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

    def answer(self, error: Exception | None) -> None:
        """Call `done`, unless nobody waits."""
        if self.cancelled:
            return
        try:
            self.done(self, error)
        except Exception:  # The batcher has others to serve.
            logger.exception("an image could not be answered")


class _Group:
    """Images in calls together until one comes or goes; what stays the same is put together once.

    Args:
        items: the images, all of one kind.
        size: rows of a call; those that no image needs repeat the last one.

    Attributes:
        left: calls until the first of them is done.
        new: those that were in no call yet.
        watched: those that tell somebody after each step.
    """

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items = items
        self.size = size
        self.rows = sum(item.rows for item in items)
        self.left = min(item.steps - item.position for item in items)
        self.new = [item for item in items if item.position == 0]
        self.watched = [item for item in items if item.after_update is not None]
        padding = size - self.rows
        halves = [half for item in items for half in item.halves]
        halves += halves[-1:] * padding
        inputs = items[0].start.inputs
        self._conditional = {
            name: _joined([half[name] for half in halves]) for name in inputs.conditional
        }
        self._shared = inputs.shared
        # Of each row of a call, which image it belongs to: in order, "no condition" first, then padding.
        places = [place for place, item in enumerate(items) for _ in range(item.rows)]
        self._places = [*places, *places[-1:] * padding]
        self._timesteps = self._all_timesteps()

    def _all_timesteps(self) -> np.ndarray:
        """Those of all calls until the first is done, float32[left, size]."""
        found = [
            item.start.solver.timesteps[item.position : item.position + self.left]
            for item in self.items
        ]
        return np.array(found, np.float32).T[:, self._places]

    def step(self, model: ImageModel) -> None:
        """Move each image one step on."""
        x = _joined([item.start.solver.scaled(item.x, item.position) for item in self.items])
        if len(x) != self.size:
            x = x[self._places]
        timesteps = self._timesteps[-self.left]
        predicted = model.denoise(x, timesteps, self._conditional, self._shared)
        first = 0
        for item in self.items:
            own = predicted[first : first + item.rows, : item.x.shape[1]]
            first += item.rows
            if item.rows == 2:
                without, with_condition = own[:1], own[1:]
                own = without + item.start.guidance * (with_condition - without)
            item.x, item.clean = item.start.solver.step(item.x, own, item.position)
            item.position += 1
        self.left -= 1


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


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
        max_rows: rows in one call, at least 2.
        sizes: the only batch sizes to call it with, ascending, smaller batches are padded; None: any.
        more_sizes: whether `add_size` will bring others; until `no_more_sizes`, images wait for one that
            they fit in.
        batching: `step`, or `request`: a batch begins together, all of it with the same number of steps
            and the same guidance, and nothing joins until it is done. This is how servers that call
            whole pipelines batch, and there to be compared with.
        observer: is told what happens.

    Attributes:
        died: whether its thread ended by what it could not answer anybody with.
    """

    def __init__(
        self,
        model: ImageModel,
        *,
        max_rows: int,
        sizes: Sequence[int] | None = None,
        more_sizes: bool = False,
        batching: Batching = "step",
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.sizes: list[int] | None = None if sizes is None else list(sizes)
        self.batching = batching
        self._more_sizes = more_sizes
        self._observer = observer
        self._items: list[Item] = []
        self._batch: list[Item] = []
        self._changed = False
        self._in_call = 0
        self._wake = threading.Condition()
        self._closed: Exception | None = None
        self.died = False
        self._calls = 0
        self._thread = threading.Thread(target=self._run, name=f"denoise-{model.info.name}")
        self._thread.daemon = True
        self._thread.start()

    def put(self, items: Sequence[Item]) -> None:
        """Take on the images of one request."""
        now = time.monotonic()
        with self._wake:
            refusal = self._closed
            if not self._more_sizes and any(item.rows > self._most() for item in items):
                refusal = refusal or _does_not_fit()
            if refusal is None:
                for item in items:
                    item.came = now
                    item.order = self._calls + item.index * item.steps
                self._items += items
                self._items.sort(key=lambda item: item.order)
                self._change()
                return
        for item in items:
            item.answer(refusal)

    @property
    def waiting(self) -> int:
        """Images that are not in the call under way."""
        return max(0, len(self._items) - self._in_call)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def add_size(self, size: int) -> None:
        """Allow another batch size, once the model is ready for it."""
        assert self.sizes is not None
        with self._wake:
            self.sizes = sorted({*self.sizes, size})
            self._change()

    def no_more_sizes(self) -> None:
        """Images that fit in none of the sizes need not wait any longer."""
        with self._wake:
            self._more_sizes = False
            hopeless = [item for item in self._items if item.rows > self._most()]
        self._finish(hopeless, _does_not_fit())

    def refuse(self, error: Exception) -> None:
        """Give up all images, and those that still come; the call that is running is still finished."""
        with self._wake:
            self._closed = error
            self._change()
            given_up, self._items, self._batch = self._items, [], []
        for item in given_up:
            item.answer(error)
            item.cancelled = True

    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """The same, and wait so long for the end of the thread; whether it came."""
        self.refuse(error)
        self._thread.join(seconds)
        return not self.alive

    def _change(self) -> None:
        """Have the images of the next call chosen anew; the lock is held."""
        self._changed = True
        self._wake.notify()

    def _run(self) -> None:
        try:
            while chosen := self._next():
                try:
                    self._call_while_unchanged(chosen)
                except Exception as error:
                    # Whatever the engine threw is the answer to these images; the thread has to live on.
                    logger.exception("a call of the denoiser failed")
                    self._finish(chosen, error)
        except BaseException:  # Of this thread nobody else would hear.
            self.died = True
            logger.critical("the batcher died; start the server again", exc_info=True)
            self.refuse(RuntimeError("its batcher has died; the server has to be started again"))

    def _next(self) -> list[Item]:
        """The images of the next call, as soon as there are any; none at the end."""
        with self._wake:
            while not (chosen := self._choose()) and self._closed is None:
                self._wake.wait()
            self._changed = False
            self._in_call = len(chosen)
            return chosen if self._closed is None else []

    def _call_while_unchanged(self, chosen: list[Item]) -> None:
        rows = size = sum(item.rows for item in chosen)
        if self.sizes is not None:
            size = next(size for size in self.sizes if size >= rows)
        group = _Group(chosen, size)
        # While nobody comes or goes the next call is of the same images: no lock, no choice.
        while not self._changed and not any(item.cancelled for item in chosen):
            self._call(group)

    def _choose(self) -> list[Item]:
        """The images of the next call; cancelled ones are dropped."""
        if any(item.cancelled for item in self._items):
            self._drop(item for item in self._items if item.cancelled)
        if self.batching == "step":
            return self._fill(self._items, lambda item, first: item.kind == first.kind)
        if not self._batch:
            self._batch = self._fill(self._items, _same_call)
        return self._batch

    def _most(self) -> int:
        return self.max_rows if self.sizes is None else min(self.max_rows, self.sizes[-1])

    def _fill(self, items: list[Item], fits: Callable[[Item, Item], bool]) -> list[Item]:
        most = self._most()
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

    def _call(self, group: _Group) -> None:
        begun = time.monotonic()
        group.step(self.model)
        self._calls += 1
        if self._observer is not None:
            self._observer.called(time.monotonic() - begun, group.rows, group.size)
            for item in group.new:
                self._observer.waited(begun - item.came)
            group.new = []
        if not group.left:
            self._finish([item for item in group.items if item.position == item.steps], None)
        for item in group.watched:
            if item.position < item.steps and not item.cancelled:
                assert item.after_update is not None
                try:
                    item.after_update(item)
                except Exception as error:  # Of this image alone.
                    logger.exception("a step could not be told")
                    self._finish([item], error)

    def _finish(self, items: Sequence[Item], error: Exception | None) -> None:
        """Answer images, unless somebody else has: whoever takes one off the list answers it."""
        with self._wake:
            listed = set(self._items)
            mine = [item for item in items if item in listed]
            self._drop(items)
            self._change()
        for item in mine:
            item.answer(error)


def _does_not_fit() -> Exception:
    return RuntimeError("no batch size that an image with guidance fits in could be compiled")


def _same_call(item: Item, first: Item) -> bool:
    """Whether a pipeline could draw both in one call."""
    return (
        item.kind == first.kind
        and item.steps == first.steps
        and item.rows == first.rows
        and item.start.guidance == first.start.guidance
    )
