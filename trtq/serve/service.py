"""The image generator of this process, which accepts requests up to a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from trtq.serve.generation import CodecThread
from trtq.serve.http.errors import ApiError
from trtq.serve.model_queue import ModelQueue
from trtq.serve.models.base import GenerationRequest
from trtq.serve.options import Limits
from trtq.serve.requests import DrawOptions, Event, ImageGenerator, draining_error, too_late

__all__ = ["Service"]


class Service(ImageGenerator):
    """Draws images for requests, in this process.

    Args:
        served: models by name, the default model first.
        limits: limits on requests.
    """

    def __init__(self, served: Mapping[str, ModelQueue], limits: Limits) -> None:
        super().__init__({name: model.info for name, model in served.items()}, limits)
        self.served = dict(served)
        self._codec = CodecThread()

    @property
    def under_way(self) -> int:
        """Number of accepted images that are not complete."""
        return sum(model.under_way for model in self.served.values())

    @property
    def alive(self) -> bool:
        """Whether the threads of all models are running."""
        return all(model.alive for model in self.served.values())

    @property
    def died(self) -> bool:
        """Whether the thread of a model ended because of an error."""
        return any(model.died for model in self.served.values())

    async def draw(
        self, name: str, request: GenerationRequest, options: DrawOptions
    ) -> AsyncGenerator[Event]:
        """See `ImageGenerator`."""
        limit = self.limits.deadline_s
        seconds = limit if options.deadline_s is None else min(options.deadline_s, limit)
        generation = self.served[name].generation(request, options, self._codec)
        deadline = generation.fail_after(seconds, too_late(seconds))
        try:
            try:
                async with asyncio.timeout(seconds):
                    await generation.begin()
            except TimeoutError as err:
                raise too_late(seconds) from err
            yield Event("accepted", 0, 0, request.steps)
            remaining = request.count
            while remaining:
                event = await generation.events.get()
                if isinstance(event, Exception):
                    raise _as_api_error(event)
                remaining -= event.kind == "image"
                yield event
        finally:
            deadline.cancel()
            generation.cancel()

    def give_up(self) -> None:
        """Answer all current and future requests with 503."""
        for model in self.served.values():
            model.refuse(draining_error())

    def close(self, seconds: float | None = None) -> bool:
        """End all threads.

        Args:
            seconds: maximum time to wait for each thread, in seconds; None: no limit.

        Returns:
            Whether all threads ended in time.
        """
        ended = [model.close(draining_error(), seconds) for model in self.served.values()]
        self._codec.close(wait=all(ended))
        return all(ended)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    failed = ApiError(500, "engine_error", f"the model failed: {error}")
    failed.__cause__ = error
    return failed
