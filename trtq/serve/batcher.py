"""Step-level continuous batching: images at different denoising steps share one call of the denoiser.

The graph computes the step index from the timestep, for each row of a batch. So the images of a call may
be at different steps and have different step counts, seeds and guidance: an image joins at the next call
and leaves when it is complete. No image depends on the others in its batch: in a batch of the same size
an image is the same, bit for bit, alone or with others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from trtq.serve.batch import Batch, Item
from trtq.serve.models.base import ImageModel
from trtq.serve.options import Batching

__all__ = ["Batcher", "Observer", "batch_sizes"]

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Callbacks for the work of a batcher, called from its thread."""

    def called(self, seconds: float, rows: int, size: int) -> None:
        """Called after each denoiser call.

        Args:
            seconds: duration of the call, in seconds.
            rows: number of rows that belong to images.
            size: batch size of the call, in rows, including padding.
        """

    def waited(self, seconds: float) -> None:
        """Called after an image's first step; `seconds` is its queueing time, in seconds."""


def batch_sizes(max_rows: int) -> tuple[int, ...]:
    """The powers of two below `max_rows`, and `max_rows` itself."""
    powers = [1 << power for power in range(max_rows.bit_length()) if 1 << power < max_rows]
    return (*powers, max_rows)


class Batcher:
    """A thread that calls the denoiser of one model.

    The images that arrive first are in every call until they are complete. The images of one request are
    interleaved with other requests: image k queues as if it had arrived k images later, so a large
    request cannot delay a single-image request, and no image waits forever.

    Args:
        model: the model whose denoiser is called.
        max_rows: maximum number of rows per call, at least 2.
        sizes: allowed batch sizes in rows, ascending, to which smaller batches are padded; None: any
            size.
        more_sizes: whether `add_size` will add sizes; until `no_more_sizes`, an image that fits in no
            size waits for a larger one.
        batching: `step`, or `request`: a batch starts together, its images have the same number of steps
            and the same guidance, and no image joins until the batch is complete. Servers that call
            whole pipelines batch this way; the strategy exists for comparison.
        observer: callbacks for metrics.

    Attributes:
        died: whether the thread ended because of an error.
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
        self._request_batch: list[Item] = []
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
        """Queue the images of one request."""
        now = time.monotonic()
        with self._wake:
            refusal = self._closed
            if not self._more_sizes and any(item.rows > self._max_batch() for item in items):
                refusal = refusal or _does_not_fit()
            if refusal is None:
                for item in items:
                    item.queued_at = now
                    item.order = self._calls + item.index * item.steps
                self._items += items
                self._items.sort(key=lambda item: item.order)
                self._notify()
                return
        for item in items:
            item.finish(refusal)

    @property
    def waiting(self) -> int:
        """Number of queued images that are not in the current call."""
        return max(0, len(self._items) - self._in_call)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return not self.died and self._thread.is_alive()

    def add_size(self, size: int) -> None:
        """Allow another batch size, once the model is ready for it."""
        assert self.sizes is not None
        with self._wake:
            self.sizes = sorted({*self.sizes, size})
            self._notify()

    def no_more_sizes(self) -> None:
        """Fail the images that fit in none of the batch sizes, since no further size will be added."""
        with self._wake:
            self._more_sizes = False
            hopeless = [item for item in self._items if item.rows > self._max_batch()]
        self._finish(hopeless, _does_not_fit())

    def refuse(self, error: Exception) -> None:
        """Fail all current and future images with `error`; a call in progress runs to its end."""
        with self._wake:
            self._closed = error
            self._notify()
            given_up, self._items, self._request_batch = self._items, [], []
        for item in given_up:
            item.finish(error)
            item.cancelled = True

    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """Refuse all images and wait until the thread ends.

        Args:
            error: error with which the images fail.
            seconds: maximum waiting time, in seconds; None: no limit.

        Returns:
            Whether the thread ended in time.
        """
        self.refuse(error)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _notify(self) -> None:
        """Make the thread choose the images of the next call again. The caller holds the lock."""
        self._changed = True
        self._wake.notify()

    def _run(self) -> None:
        try:
            while chosen := self._next():
                try:
                    self._call_while_unchanged(chosen)
                except Exception as error:
                    # An engine may raise any exception, which must end these images but not the thread.
                    logger.exception("a call of the denoiser failed")
                    self._finish(chosen, error)
        except BaseException:  # Otherwise the thread would end without a report.
            self.died = True
            logger.critical("the batcher died; start the server again", exc_info=True)
            self.refuse(RuntimeError("its batcher has died; the server has to be started again"))

    def _next(self) -> list[Item]:
        """Wait for images and return those of the next call; an empty list after `refuse`."""
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
        batch = Batch(chosen, size)
        # While no image joins or leaves, the next call has the same images and needs no lock.
        while not self._changed and not any(item.cancelled for item in chosen):
            self._call(batch)

    def _choose(self) -> list[Item]:
        """Choose the images of the next call and drop the cancelled images."""
        if any(item.cancelled for item in self._items):
            self._drop(item for item in self._items if item.cancelled)
        if self.batching == "step":
            return self._fill(self._items, lambda item, first: item.kind == first.kind)
        if not self._request_batch:
            self._request_batch = self._fill(self._items, _same_call)
        return self._request_batch

    def _max_batch(self) -> int:
        return self.max_rows if self.sizes is None else min(self.max_rows, self.sizes[-1])

    def _fill(self, items: list[Item], fits: Callable[[Item, Item], bool]) -> list[Item]:
        max_rows = self._max_batch()
        chosen: list[Item] = []
        rows = 0
        for item in items:
            if rows == max_rows:
                break
            if rows + item.rows <= max_rows and (not chosen or fits(item, chosen[0])):
                chosen.append(item)
                rows += item.rows
        return chosen

    def _drop(self, items: Iterable[Item]) -> None:
        dropped = set(items)
        self._items = [item for item in self._items if item not in dropped]
        self._request_batch = [item for item in self._request_batch if item not in dropped]

    def _call(self, batch: Batch) -> None:
        begun = time.monotonic()
        batch.step(self.model)
        self._calls += 1
        if self._observer is not None:
            self._observer.called(time.monotonic() - begun, batch.rows, batch.size)
            for item in batch.new:
                self._observer.waited(begun - item.queued_at)
            batch.new = []
        if not batch.remaining:
            self._finish([item for item in batch.items if item.position == item.steps], None)
        for item in batch.watched:
            if item.position < item.steps and not item.cancelled:
                assert item.on_step is not None
                try:
                    item.on_step(item)
                except Exception as error:  # Ends this image only.
                    logger.exception("the progress of an image could not be reported")
                    self._finish([item], error)

    def _finish(self, items: Sequence[Item], error: Exception | None) -> None:
        """Finish images that this caller has removed from the list, so that each ends once."""
        with self._wake:
            listed = set(self._items)
            taken = [item for item in items if item in listed]
            self._drop(items)
            self._notify()
        for item in taken:
            item.finish(error)


def _does_not_fit() -> Exception:
    return RuntimeError("no batch size that an image with guidance fits in could be compiled")


def _same_call(item: Item, first: Item) -> bool:
    """Whether one call of a whole pipeline could draw both images."""
    return (
        item.kind == first.kind
        and item.steps == first.steps
        and item.rows == first.rows
        and item.start.guidance == first.start.guidance
    )
