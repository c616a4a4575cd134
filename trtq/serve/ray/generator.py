"""The image generator of the ingress: passes requests to replicas and retries lost requests."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from trtq._optional import require
from trtq.serve.http.errors import ApiError
from trtq.serve.logs import FIELDS
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits
from trtq.serve.requests import DrawOptions, Event, ImageGenerator, too_late

__all__ = ["RemoteGenerator"]

logger = logging.getLogger(__name__)
_TRIES = 10
_PAUSE_S = 0.2


class RemoteGenerator(ImageGenerator):
    """Draws images with the replicas of a deployment.

    Args:
        replicas: Ray's handle of the deployment.
        models: model descriptions by name.
        limits: limits of one replica.
    """

    def __init__(self, replicas: Any, models: Mapping[str, ModelInfo], limits: Limits) -> None:
        super().__init__(models, limits)
        self._replicas = replicas.options(stream=True)
        self._under_way = 0
        self._waiting: set[asyncio.Future[Event | ApiError | None]] = set()

    @property
    def under_way(self) -> int:
        """See `ImageGenerator`."""
        return self._under_way

    def give_up(self) -> None:
        """See `ImageGenerator`."""
        for future in list(self._waiting):
            future.cancel()

    async def draw(
        self, name: str, request: GenerationRequest, options: DrawOptions
    ) -> AsyncGenerator[Event]:
        """See `ImageGenerator`."""
        lost = require("ray").exceptions.RayActorError
        deadline_s = math.inf if options.deadline_s is None else options.deadline_s
        seconds = min(deadline_s, self.limits.deadline_s)
        end = time.monotonic() + seconds
        passed_on: set[tuple[str, int, int]] = set()
        self._under_way += request.count
        try:
            for _ in range(_TRIES):
                remaining_s = end - time.monotonic()
                if remaining_s <= 0:
                    raise too_late(seconds)
                stream = self._replicas.draw.remote(
                    name, request, replace(options, deadline_s=remaining_s)
                )
                finished = False
                try:
                    events = aiter(stream)
                    while (event := await self._next(events, end, seconds)) is not None:
                        key = event.kind, event.index, event.step
                        if key not in passed_on:
                            passed_on.add(key)
                            yield event
                    finished = True
                    return
                except lost:
                    logger.warning("a replica was lost", extra={FIELDS: {"model": name}})
                finally:
                    if not finished:  # A finished stream needs no cancellation.
                        stream.cancel()
                await asyncio.sleep(_PAUSE_S)
            text = "the replicas of this model keep failing; try again"
            raise ApiError(503, "replicas_lost", text)
        finally:
            self._under_way -= request.count

    async def _next(
        self, events: AsyncIterator[Event | ApiError], end: float, seconds: float
    ) -> Event | None:
        """The next event of a replica, or None at the end.

        Args:
            events: events of the replica.
            end: `time.monotonic()` of the deadline.
            seconds: time from the request's arrival to the deadline, in seconds.

        Raises:
            ApiError: the error of the replica; 408 the deadline has passed, even if the replica does
                not respond; 503 the request is cancelled because the server is about to stop.
        """
        coming = asyncio.ensure_future(anext(events, None))
        self._waiting.add(coming)
        try:
            await asyncio.wait((coming,), timeout=max(end - time.monotonic(), 0))
            if not coming.done():
                raise too_late(seconds)
            if coming.cancelled():
                self.refuse_when_draining()
            event = coming.result()
        finally:
            self._waiting.discard(coming)
            coming.cancel()
        if isinstance(event, ApiError):
            raise event
        return event
