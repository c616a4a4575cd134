"""One request in progress: from its first denoising step to PNG files."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trtq.errors import UsageError
from trtq.serve.batch import Item
from trtq.serve.batcher import Batcher
from trtq.serve.http.errors import ApiError
from trtq.serve.http.png import png_bytes
from trtq.serve.model_queue import ModelQueue
from trtq.serve.models.base import GenerationRequest, ImageModel
from trtq.serve.models.samples import Samples
from trtq.serve.requests import DrawOptions, Event

__all__ = ["CodecThread", "Generation", "StepGeneration"]


class CodecThread:
    """The thread that encodes prompts and decodes images, since the batchers' threads only denoise."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "encode-decode")

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call `work` in the thread and return its result.

        Args:
            work: function to call.
            arguments: positional arguments of `work`.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work` in the thread without waiting for it; safe to call from any thread.

        Args:
            work: function to call.
            arguments: positional arguments of `work`.
        """
        with suppress(RuntimeError):  # The executor is shut down: no client waits for the result.
            self._executor.submit(work, *arguments)

    def close(self, *, wait: bool) -> None:
        """Stop the thread and drop its queue.

        Args:
            wait: whether to wait for the call in progress.
        """
        self._executor.shutdown(wait=wait, cancel_futures=True)


class Generation(ABC):
    """The images of one request, counted as in progress until they are complete or cancelled.

    Args:
        queue: the model that draws.
        request: the images to draw.

    Attributes:
        events: the events of the images, and the exception that ends the request, if any.

    Raises:
        ApiError: 429, the queue has no room for the images.
    """

    def __init__(self, queue: ModelQueue, request: GenerationRequest) -> None:
        queue.take(request.count)
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._remaining = request.count
        self._begun = time.monotonic()
        self._queue = queue
        self._loop = asyncio.get_running_loop()

    @abstractmethod
    async def begin(self) -> None:
        """Hand the images to the thread that draws.

        Raises:
            ApiError: 400, the model cannot draw this request.
        """

    @abstractmethod
    def drop(self) -> None:
        """Mark the images that are not complete as cancelled."""

    def fail_after(self, seconds: float, error: ApiError) -> asyncio.TimerHandle:
        """Schedule the end of the request with `error` after `seconds` seconds."""
        return self._loop.call_later(seconds, self.events.put_nowait, error)

    def cancel(self) -> None:
        """Drop the images that are not complete, since no client waits for them."""
        self.drop()
        self._queue.under_way -= self._remaining
        self._remaining = 0

    def publish(self, event: Event | Exception) -> None:
        """Put an event on the queue, from any thread."""
        with suppress(RuntimeError):  # The loop is closed: no client waits for the event.
            self._loop.call_soon_threadsafe(self._enqueue, event)

    def _enqueue(self, event: Event | Exception) -> None:
        """Put an event on the queue, in the loop's thread; a complete image frees its slot."""
        if self._remaining and isinstance(event, Event) and event.kind == "image":
            if self._remaining == 1:
                self._queue.finished(time.monotonic() - self._begun)
            self._remaining -= 1
            self._queue.under_way -= 1
        self.events.put_nowait(event)


class StepGeneration(Generation):
    """The images of one request to a model that is batched by denoising step.

    Args:
        queue: the model that draws.
        model: the model whose prompts and images are encoded and decoded.
        batcher: batcher of the model.
        request: the images to draw.
        options: delivery of the images: deadline, previews and progress events.
        codec: thread that encodes prompts and decodes images; not used for models with a cheap codec.

    Raises:
        ApiError: 429, the queue has no room for the images.
    """

    def __init__(
        self,
        queue: ModelQueue,
        model: ImageModel,
        batcher: Batcher,
        request: GenerationRequest,
        options: DrawOptions,
        codec: CodecThread,
    ) -> None:
        super().__init__(queue, request)
        self._model = model
        self._batcher = batcher
        self._request = request
        self._options = options
        self._codec = codec
        self._items: list[Item] = []
        self._preview_at: set[int] = set()

    async def begin(self) -> None:
        """See `Generation`."""
        try:
            if self._model.cheap_codec:
                starts = self._model.starts(self._request)
            else:
                starts = await self._codec.run(self._model.starts, self._request)
        except UsageError as err:
            raise ApiError(400, "invalid_value", str(err)) from err
        # Previews are spread evenly over the steps; the initial noise gets no preview.
        calls, parts = len(starts[0].solver.timesteps), self._options.previews + 1
        self._preview_at = {round(part * calls / parts) for part in range(1, parts)}
        watched = self._options.progress or self._preview_at
        on_step = self._on_step if watched else None
        self._items = [
            Item(start, index, on_step, self._on_done) for index, start in enumerate(starts)
        ]
        self._batcher.put(self._items)

    def drop(self) -> None:
        """See `Generation`."""
        for item in self._items:
            item.cancelled = True

    def _on_step(self, item: Item) -> None:
        if self._options.progress:
            self.publish(Event("progress", item.index, item.position, item.steps))
        if item.position in self._preview_at:
            self._decode("preview", item, item.clean)

    def _on_done(self, item: Item, error: Exception | None) -> None:
        if error is not None:
            self.publish(error)
            return
        self._decode("image", item, item.x)

    def _decode(self, kind: str, item: Item, x: Samples) -> None:
        if self._model.cheap_codec:
            self._publish_picture(kind, item, item.position, x)
        else:
            self._codec.submit(self._publish_picture, kind, item, item.position, x)

    def _publish_picture(self, kind: str, item: Item, position: int, x: Samples) -> None:
        if item.cancelled:
            return
        try:
            png = png_bytes(self._model.decode(x))
        except Exception as error:  # Ends this request only; the thread also serves other requests.
            self.publish(error)
            return
        if kind == "image":
            self._queue.metrics.drawn()
        self.publish(Event(kind, item.index, position, item.steps, png))
