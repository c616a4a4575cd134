"""The thread that draws the images of a recorded pipeline, one after the other."""

from __future__ import annotations

import heapq
import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trtq.calls.user_call import UserCall
from trtq.errors import UsageError
from trtq.serve.metrics import ModelMetrics
from trtq.serve.models.recorded import RecordedModel

__all__ = ["PipelineWorker", "QueuedImage"]

logger = logging.getLogger(__name__)


class _DroppedError(BaseException):
    """Ends a pipeline's call whose image no client waits for; pipelines catch `Exception`."""


@dataclass(eq=False)
class QueuedImage:
    """One image in progress.

    Attributes:
        call: arguments of the pipeline's call.
        seed: seed of the request.
        index: index of the image in its request.
        on_call: called in the worker's thread with the number of completed denoiser calls.
        on_done: called once with the PNG file and None, or with None and the error; not called for a
            cancelled image.
        cancelled: whether the client no longer waits for the image.
        finished: whether `on_done` was called.
        order: position in the queue.
        queued_at: `time.monotonic()` at which the worker received the image.
    """

    call: UserCall
    seed: int
    index: int
    on_call: Callable[[int], None]
    on_done: Callable[[bytes | None, Exception | None], None]
    cancelled: bool = False
    finished: bool = False
    order: tuple[int, int] = (0, 0)
    queued_at: float = 0.0

    def __lt__(self, other: QueuedImage) -> bool:
        return self.order < other.order


class PipelineWorker:
    """A thread that draws one image after the other.

    Image k of a request queues as if it had arrived k images later, so a large request cannot delay a
    request for one image.

    Args:
        model: the model that draws.

    Attributes:
        died: whether the thread ended because of an error.
        metrics: metrics of the model; None until the model is served.
    """

    def __init__(self, model: RecordedModel) -> None:
        self.died = False
        self.metrics: ModelMetrics | None = None
        self._model = model
        self._waiting: list[QueuedImage] = []
        self._current: QueuedImage | None = None
        self._drawn = 0
        self._arrivals = 0
        self._wake = threading.Condition()
        self._closed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"pipeline-{model.info.name}")
        self._thread.daemon = True
        self._thread.start()

    def put(self, images: Sequence[QueuedImage]) -> None:
        """Queue the images of one request."""
        now = time.monotonic()
        with self._wake:
            refusal = self._closed
            for image in images if refusal is None else ():
                self._arrivals += 1
                image.queued_at = now
                image.order = self._drawn + image.index, self._arrivals
                heapq.heappush(self._waiting, image)
            self._wake.notify()
        for image in images if refusal is not None else ():
            self._finish(image, None, refusal)

    @property
    def waiting(self) -> int:
        """Number of queued images, without the current one."""
        return sum(not image.cancelled for image in list(self._waiting))

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return not self.died and self._thread.is_alive()

    def refuse(self, error: Exception) -> None:
        """Fail all current and future images; a call in progress ends before the next denoiser call."""
        with self._wake:
            self._closed = error
            given_up, self._waiting = self._waiting, []
            given_up += [] if self._current is None else [self._current]
            self._wake.notify()
        for image in given_up:
            self._finish(image, None, error)
            image.cancelled = True

    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """Refuse all images and wait until the thread ends; see `ModelQueue.close`."""
        self.refuse(error)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (image := self._next()) is not None:
                self._draw(image)
        except BaseException:  # Otherwise the thread would end without a report.
            self.died = True
            logger.critical("the worker died; start the server again", exc_info=True)
            self.refuse(RuntimeError("its worker has died; the server has to be started again"))

    def _next(self) -> QueuedImage | None:
        """Wait for an image; None after `refuse`."""
        with self._wake:
            self._current = None
            while self._closed is None:
                while self._waiting:
                    image = heapq.heappop(self._waiting)
                    if not image.cancelled:
                        self._current = image
                        return image
                self._wake.wait()
        return None

    def _draw(self, image: QueuedImage) -> None:
        def before(calls: int) -> None:
            if image.cancelled:
                raise _DroppedError
            if not calls and self.metrics is not None:
                self.metrics.waited(time.monotonic() - image.queued_at)
            image.on_call(calls)

        def after(seconds: float) -> None:
            if self.metrics is not None:
                self.metrics.called(seconds, 1, 1)

        png: bytes | None = None
        error: Exception | None = None
        try:
            drawn = self._model.draw(image.call, image.seed, image.index, before, after)
            png = _png_file(drawn)
        except _DroppedError:
            return
        except Exception as err:  # Pipelines raise any exception, which ends this image only.
            if not isinstance(err, UsageError):
                logger.exception("a call of the pipeline failed")
            error = err
        self._drawn += 1
        self._finish(image, png, error)

    def _finish(self, image: QueuedImage, png: bytes | None, error: Exception | None) -> None:
        with self._wake:
            if image.finished or image.cancelled:
                return
            image.finished = True
        image.on_done(png, error)


def _png_file(image: Any) -> bytes:
    """The bytes of a PNG file of a PIL image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
