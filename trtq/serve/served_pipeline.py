"""One model of a server that draws by request: one call of its pipeline per image, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from trtq.errors import UsageError
from trtq.serve.generation import CodecThread, Generation
from trtq.serve.http.errors import ApiError
from trtq.serve.metrics import Metrics
from trtq.serve.model_queue import ModelQueue
from trtq.serve.models.base import GenerationRequest
from trtq.serve.models.recorded import RecordedModel
from trtq.serve.options import Limits
from trtq.serve.pipeline_worker import PipelineWorker, QueuedImage
from trtq.serve.requests import DrawOptions, Event

__all__ = ["CallGeneration", "ServedPipeline"]


class ServedPipeline(ModelQueue):
    """A recorded pipeline with its worker and a bounded number of images in progress.

    Args:
        model: the model.
        limits: limits of the server.
        metrics: metrics of the server.
        load_seconds: time that loading the model took, in seconds.
    """

    def __init__(
        self, model: RecordedModel, limits: Limits, metrics: Metrics, *, load_seconds: float = 0.0
    ) -> None:
        self.model = model
        self.worker = PipelineWorker(model)
        super().__init__(
            model.info,
            limits,
            metrics,
            load_seconds=load_seconds,
            waiting=lambda: self.worker.waiting,
            max_rows=1,
        )
        self.worker.metrics = self.metrics

    @property
    def alive(self) -> bool:
        """See `ModelQueue`."""
        return self.worker.alive

    @property
    def died(self) -> bool:
        """See `ModelQueue`."""
        return self.worker.died

    def generation(
        self, request: GenerationRequest, options: DrawOptions, codec: CodecThread
    ) -> CallGeneration:
        """See `ModelQueue`; the worker encodes and decodes, so `codec` is not used."""
        return CallGeneration(self, request, options)

    def refuse(self, error: Exception) -> None:
        """See `ModelQueue`."""
        self.worker.refuse(error)

    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """See `ModelQueue`."""
        return self.worker.close(error, seconds)


class CallGeneration(Generation):
    """The images of one request to a recorded pipeline. It sends no previews.

    Args:
        served: the model that draws.
        request: the images to draw.
        options: delivery of the images: deadline and progress events.

    Raises:
        ApiError: 429, the queue has no room for the images.
    """

    def __init__(
        self, served: ServedPipeline, request: GenerationRequest, options: DrawOptions
    ) -> None:
        super().__init__(served, request)
        self._served = served
        self._request = request
        self._options = options
        self._images: list[QueuedImage] = []

    async def begin(self) -> None:
        """See `Generation`."""
        request = self._request
        try:
            call = self._served.model.call_of(request)
        except UsageError as err:
            raise ApiError(400, "invalid_value", str(err)) from err
        self._images = [
            QueuedImage(call, request.seed, index, self._progress(index), self._done(index))
            for index in range(request.count)
        ]
        self._served.worker.put(self._images)

    def drop(self) -> None:
        """See `Generation`."""
        for image in self._images:
            image.cancelled = True

    def _progress(self, index: int) -> Callable[[int], None]:
        """A function that reports the progress of one image."""
        steps, per_step = self._request.steps, self._served.model.calls_per_step
        last = 0

        def on_call(calls: int) -> None:
            nonlocal last
            step = min(steps - 1, int(calls / per_step))
            if self._options.progress and step > last:
                self.publish(Event("progress", index, step, steps))
            last = step

        return on_call

    def _done(self, index: int) -> Callable[[bytes | None, Exception | None], None]:
        """A function that publishes one image, or the error that ends the request."""

        def on_done(png: bytes | None, error: Exception | None) -> None:
            if isinstance(error, UsageError):
                self.publish(ApiError(400, "invalid_value", str(error)))
            elif error is not None:
                self.publish(error)
            else:
                assert png is not None
                self._queue.metrics.drawn()
                steps = self._request.steps
                self.publish(Event("image", index, steps, steps, png))

        return on_done
