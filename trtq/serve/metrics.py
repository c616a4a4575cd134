"""What `/metrics` tells Prometheus: one registry per server, so two in a process do not mix."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trtq._optional import require
from trtq.resources import peak_rss_bytes

__all__ = ["Metrics", "ModelMetrics"]

_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_REQUEST_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_CALLS_KEPT = 256


class Metrics:
    """All measurements of a server."""

    def __init__(self) -> None:
        prometheus = require("prometheus_client")
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self._expose = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST

        def make(kind: str, name: str, text: str, *labels: str, **options: Any) -> Any:
            cls = getattr(prometheus, kind)
            return cls(f"trtq_{name}", text, labels, registry=self.registry, **options)

        peak = make("Gauge", "peak_resident_memory_bytes", "Largest resident memory so far.")
        peak.set_function(peak_rss_bytes)
        self._under_way = make(
            "Gauge", "images_under_way", "Images accepted and not finished.", "model"
        )
        self._waiting = make(
            "Gauge", "images_waiting", "Images that are in no call yet, the queue's depth.", "model"
        )
        self._max_rows = make(
            "Gauge",
            "batch_rows_limit",
            "Most rows of a call; occupancy is batch_rows by it.",
            "model",
        )
        self._load = make("Gauge", "model_load_seconds", "Opening the model took so long.", "model")
        self._wait = make(
            "Histogram",
            "queue_wait_seconds",
            "From accepted to the first denoising step.",
            "model",
            buckets=_REQUEST_S,
        )
        self._step = make(
            "Histogram",
            "step_seconds",
            "One call of the denoiser, and moving its images on.",
            "model",
            buckets=_STEP_S,
        )
        self._rows = make(
            "Histogram", "batch_rows", "Rows of images in a call.", "model", buckets=_ROWS
        )
        self._padding = make("Counter", "padding_rows", "Rows that filled a batch.", "model")
        self._images = make("Counter", "images", "Images drawn.", "model")
        self._requests = make(
            "Histogram",
            "request_seconds",
            "From a request's headers to the end of the answer.",
            "path",
            "status",
            buckets=_REQUEST_S,
        )
        self._models: list[ModelMetrics] = []
        self._errors = make("Counter", "errors", "Requests that were not served.", "code")

    def model(
        self,
        name: str,
        load_seconds: float,
        *,
        under_way: Callable[[], int],
        waiting: Callable[[], int],
        max_rows: int,
    ) -> ModelMetrics:
        """The measurements of one model; `under_way` and `waiting` count its images."""
        self._under_way.labels(name).set_function(under_way)
        self._waiting.labels(name).set_function(waiting)
        self._max_rows.labels(name).set(max_rows)
        self._load.labels(name).set(load_seconds)
        found = ModelMetrics(
            *(
                metric.labels(name)
                for metric in (self._wait, self._step, self._rows, self._padding, self._images)
            )
        )
        self._models.append(found)
        return found

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; `path` is a route's, not what a client made up."""
        self._requests.labels(path, str(status)).observe(seconds)

    def error(self, code: str) -> None:
        """A request was not served; `code` as in the answer."""
        self._errors.labels(code).inc()

    def expose(self) -> bytes:
        """Everything in Prometheus' text format."""
        for model in self._models:
            model.tell()
        found: bytes = self._expose(self.registry)
        return found


class ModelMetrics:
    """The measurements of one model; a batcher's observer."""

    def __init__(self, wait: Any, step: Any, rows: Any, padding: Any, images: Any) -> None:
        self._wait = wait
        self._step = step
        self._rows = rows
        self._padding = padding
        self._images = images
        self._calls: deque[tuple[float, int, int]] = deque()

    def called(self, seconds: float, rows: int, size: int) -> None:
        """One call of the denoiser: `rows` of images in a batch of `size`."""
        # Between two calls of a small model telling Prometheus would take a noticeable part of the time.
        self._calls.append((seconds, rows, size))
        if len(self._calls) >= _CALLS_KEPT:
            self.tell()

    def tell(self) -> None:
        """Hand on what was kept back."""
        with suppress(IndexError):  # Another thread may have taken the last one.
            while True:
                seconds, rows, size = self._calls.popleft()
                self._step.observe(seconds)
                self._rows.observe(rows)
                if size > rows:
                    self._padding.inc(size - rows)

    def waited(self, seconds: float) -> None:
        """An image was denoised for the first time, so long after it came."""
        self._wait.observe(seconds)

    def drawn(self) -> None:
        """An image is finished."""
        self._images.inc()
