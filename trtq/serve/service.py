"""Requests for images: taken on up to a bound, drawn by the batchers, given up when nobody waits."""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from trtq.documents import shown
from trtq.errors import UsageError
from trtq.limits import parse_whole
from trtq.serve.batcher import Batcher, Batching, Item
from trtq.serve.http.errors import ApiError
from trtq.serve.http.png import png_bytes
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ImageModel, ModelInfo

__all__ = [
    "Event",
    "ImageGenerator",
    "Limits",
    "ServedModel",
    "Service",
    "parse_batch_sizes",
    "too_late",
]

_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on; the ranges are checked where options are read.

    Attributes:
        batch: rows in one call of the denoiser.
        batch_sizes: the only sizes of calls; None: any, or powers of two where sizes are compiled.
        queue: images that may wait beside those in the batch.
        images: of one request.
        steps: of one image.
        body_bytes: of one request.
        deadline_s: from a request's arrival to its answer.
        body_s: for a request's body to come.
    """

    batch: Annotated[int, Field(ge=2)] = 8
    batch_sizes: tuple[int, ...] | None = None
    queue: Annotated[int, Field(ge=0)] = 64
    images: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 200
    body_bytes: Annotated[int, Field(ge=1)] = 64 << 10
    deadline_s: Annotated[float, Field(gt=0)] = 120.0
    body_s: Annotated[float, Field(gt=0)] = 10.0

    @property
    def max_images(self) -> int:
        """Images of a request that can be taken on at all."""
        return min(self.images, self.batch + self.queue)


def parse_batch_sizes(text: str, most: int) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4).

    Raises:
        UsageError: not of that form, or one is larger than `most`, or none holds an image with guidance.
    """
    try:
        sizes = tuple(sorted({parse_whole(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1 or not 2 <= sizes[-1] <= most:
        raise UsageError(
            f"the batch sizes {shown(text)} are not understood; write numbers from 1 to {most} "
            "(--max-batch), the largest at least 2, e.g. 1,2,4,8"
        )
    return sizes


@dataclass(frozen=True)
class Event:
    """Something happened to image `index` of a request.

    Attributes:
        kind: `accepted`, `progress`, `preview` or `image`.
        index: of the image in its request.
        step: steps done.
        steps: steps in all.
        png: the picture, for `preview` and `image`.
    """

    kind: str
    index: int
    step: int
    steps: int
    png: bytes = b""


class ServedModel:
    """A model with its batcher and its bounded number of images.

    Args:
        model: loaded and warm.
        limits: of the server.
        batching: see `Batcher`.
        metrics: of the server.
        sizes: batch sizes that the model is ready for; None: any.
        more_sizes: whether further sizes will follow, see `Batcher.add_size`.
        load_seconds: what opening it took.
    """

    def __init__(
        self,
        model: ImageModel,
        limits: Limits,
        batching: Batching,
        metrics: Metrics,
        *,
        sizes: Sequence[int] | None = None,
        more_sizes: bool = False,
        load_seconds: float = 0.0,
    ) -> None:
        self.model = model
        steps, most = model.info.steps, model.info.max_steps
        self.info = replace(
            model.info, steps=min(steps, limits.steps), max_steps=min(most, limits.steps)
        )
        self.under_way = 0
        self.metrics = metrics.model(
            self.info.name,
            load_seconds,
            under_way=lambda: self.under_way,
            waiting=lambda: self.batcher.waiting,
            max_rows=limits.batch,
        )
        self._most = limits.batch + limits.queue
        self._image_s = 0.0
        self.batcher = Batcher(
            model,
            max_rows=limits.batch,
            sizes=sizes,
            more_sizes=more_sizes,
            batching=batching,
            observer=self.metrics,
        )

    def take(self, count: int) -> None:
        """Count images as under way.

        Raises:
            ApiError: 429, there are too many.
        """
        if self.under_way + count > self._most:
            wait = math.ceil(self._image_s * self.under_way) or 1
            raise ApiError(
                429,
                "queue_full",
                f"{self.info.name} has {self.under_way} images under way and takes {self._most} at "
                "once; try again later",
                retry_after=min(wait, _LONGEST_RETRY_S),
            )
        self.under_way += count

    def finished(self, seconds: float) -> None:
        """Remember how long an image takes, others beside it, for `Retry-After`."""
        each = seconds / max(1, self.under_way)
        self._image_s = each if not self._image_s else 0.9 * self._image_s + 0.1 * each


class ImageGenerator(ABC):
    """What an HTTP application needs of whoever draws.

    Args:
        infos: models by name, the default first.
        limits: what to take on.
    """

    def __init__(self, infos: Mapping[str, ModelInfo], limits: Limits) -> None:
        self.infos = dict(infos)
        self.limits = limits
        self.draining = False

    @property
    def alive(self) -> bool:
        """Whether it can draw at all."""
        return True

    @property
    @abstractmethod
    def under_way(self) -> int:
        """Images accepted and not finished."""

    @abstractmethod
    def give_up(self) -> None:
        """Answer everything that is under way with 503."""

    def refuse_when_draining(self) -> None:
        """Nothing, unless the server is about to stop.

        Raises:
            ApiError: 503.
        """
        if self.draining:
            raise _draining()

    def find(self, name: str | None) -> ModelInfo:
        """The model of a name; the first for None.

        Raises:
            ApiError: 404, there is none.
        """
        if name is None:
            return next(iter(self.infos.values()))
        if name not in self.infos:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {name[:80]!r} here; there is {', '.join(self.infos)}",
                param="model",
            )
        return self.infos[name]

    @abstractmethod
    def draw(
        self,
        name: str,
        drawing: GenerationRequest,
        *,
        deadline_s: float | None = None,
        previews: int = 0,
        progress: bool = False,
    ) -> AsyncGenerator[Event]:
        """Draw a request's images; they are given up when the iterator is closed.

        The first event tells that the request was accepted: it can be drawn, and there was room for it.

        Args:
            name: of the model.
            drawing: what to draw.
            deadline_s: from now to the last image; by default and at most that of the limits.
            previews: pictures of each image before it is done.
            progress: whether to tell of every step.

        Raises:
            ApiError: 400 the model cannot draw this; 408 the deadline passed; 429 no room; 503 the
                server stops; 500 the model failed.
        """


class Service(ImageGenerator):
    """Draws images for requests, in this process.

    Args:
        hosted: models by name, the default first.
        limits: what to take on.
    """

    def __init__(self, hosted: Mapping[str, ServedModel], limits: Limits) -> None:
        super().__init__({name: one.info for name, one in hosted.items()}, limits)
        self.hosted = dict(hosted)
        # Where prompts are encoded and pictures decoded, unless that is quick: batchers only denoise.
        self._side = ThreadPoolExecutor(1, "encode-decode")

    @property
    def under_way(self) -> int:
        """Images accepted and not finished."""
        return sum(one.under_way for one in self.hosted.values())

    @property
    def alive(self) -> bool:
        """Whether all batchers run."""
        return all(one.batcher.alive for one in self.hosted.values())

    @property
    def died(self) -> bool:
        """Whether a batcher ended by itself."""
        return any(one.batcher.died for one in self.hosted.values())

    async def draw(
        self,
        name: str,
        drawing: GenerationRequest,
        *,
        deadline_s: float | None = None,
        previews: int = 0,
        progress: bool = False,
    ) -> AsyncGenerator[Event]:
        """See `ImageGenerator`."""
        hosted = self.hosted[name]
        allowed = self.limits.deadline_s
        longest = allowed if deadline_s is None else min(deadline_s, allowed)
        request = _Request(self, hosted, drawing, previews, progress)
        late = request.at(longest, too_late(longest))
        try:
            try:
                async with asyncio.timeout(longest):
                    await request.begin()
            except TimeoutError as err:
                raise too_late(longest) from err
            yield Event("accepted", 0, 0, drawing.steps)
            left = drawing.count
            while left:
                event = await request.events.get()
                if isinstance(event, Exception):
                    raise _as_api_error(event)
                left -= event.kind == "image"
                yield event
        finally:
            late.cancel()
            request.cancel()

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run something in the thread beside the batchers'."""
        return await asyncio.get_running_loop().run_in_executor(self._side, work, *arguments)

    def submit_aside(self, work: Callable[..., None], *arguments: Any) -> None:
        """The same from another thread, and without waiting."""
        with suppress(RuntimeError):  # It is shut down: nobody waits any more.
            self._side.submit(work, *arguments)

    def give_up(self) -> None:
        """Answer everything that is under way, and all that still comes, with 503."""
        for one in self.hosted.values():
            one.batcher.refuse(_draining())

    def close(self, seconds: float | None = None) -> bool:
        """End all threads; whether they did within so many seconds, each."""
        ended = [one.batcher.close(_draining(), seconds) for one in self.hosted.values()]
        self._side.shutdown(wait=all(ended), cancel_futures=True)
        return all(ended)


class _Request:
    """The images of one request, counted as under way until they are drawn or given up.

    Raises:
        ApiError: 429, there are too many.
    """

    def __init__(
        self,
        service: Service,
        hosted: ServedModel,
        drawing: GenerationRequest,
        previews: int,
        progress: bool,
    ) -> None:
        hosted.take(drawing.count)
        self._left = drawing.count
        self._begun = time.monotonic()
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._service = service
        self._hosted = hosted
        self._model = hosted.model
        self._drawing = drawing
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._items: list[Item] = []
        self._previews = previews
        self._preview_at: set[int] = set()

    async def begin(self) -> None:
        """Hand the images to the batcher."""
        try:
            if self._model.cheap_codec:
                starts = self._model.starts(self._drawing)
            else:
                starts = await self._service.aside(self._model.starts, self._drawing)
        except UsageError as err:
            raise ApiError(400, "invalid_value", str(err)) from err
        # Evenly over the steps, none at the very beginning.
        calls = len(starts[0].solver.timesteps)
        self._preview_at = {
            round((which + 1) * calls / (self._previews + 1)) for which in range(self._previews)
        }
        watched = self._progress or self._preview_at
        after_update = self._after_step if watched else None
        self._items = [
            Item(start, index, after_update, self._done) for index, start in enumerate(starts)
        ]
        self._hosted.batcher.put(self._items)

    def at(self, seconds: float, error: ApiError) -> asyncio.TimerHandle:
        """Fail after so many seconds."""
        return self._loop.call_later(seconds, self.events.put_nowait, error)

    def cancel(self) -> None:
        """Nobody waits any more; a no-op for images that are done."""
        for item in self._items:
            item.cancelled = True
        self._hosted.under_way -= self._left
        self._left = 0

    def _tell(self, event: Event | Exception) -> None:
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(self._told, event)

    def _told(self, event: Event | Exception) -> None:
        """In the loop's thread: an image that is drawn makes room, whenever its client reads it."""
        if self._left and isinstance(event, Event) and event.kind == "image":
            if self._left == 1:
                self._hosted.finished(time.monotonic() - self._begun)
            self._left -= 1
            self._hosted.under_way -= 1
        self.events.put_nowait(event)

    def _after_step(self, item: Item) -> None:
        if self._progress:
            self._tell(Event("progress", item.index, item.position, item.steps))
        if item.position in self._preview_at:
            self._show("preview", item, item.clean)

    def _done(self, item: Item, error: Exception | None) -> None:
        if error is not None:
            self._tell(error)
            return
        self._show("image", item, item.x)

    def _show(self, kind: str, item: Item, x: np.ndarray) -> None:
        if self._model.cheap_codec:
            self._picture(kind, item, item.position, x)
        else:
            self._service.submit_aside(self._picture, kind, item, item.position, x)

    def _picture(self, kind: str, item: Item, position: int, x: np.ndarray) -> None:
        if item.cancelled:
            return
        try:
            png = png_bytes(self._model.decode(x))
        except Exception as error:  # The answer to this request; the thread serves others, too.
            self._tell(error)
            return
        if kind == "image":
            self._hosted.metrics.drawn()
        self._tell(Event(kind, item.index, position, item.steps, png))


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    failed = ApiError(500, "engine_error", f"the model failed: {error}")
    failed.__cause__ = error
    return failed


def too_late(seconds: float) -> ApiError:
    """The answer to a request whose images were not done in time."""
    return ApiError(
        408,
        "deadline_exceeded",
        f"the images were not done within {seconds:g} s; ask for fewer images or steps, or later",
    )


def _draining() -> ApiError:
    return ApiError(503, "draining", "this server is about to stop; try again", retry_after=1)
