"""Prometheus metrics, one registry per server, so that servers in one process stay separate."""

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
    """All metrics of a server."""

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
            "Gauge",
            "images_waiting",
            "Images that are not in the current call: the depth of the queue.",
            "model",
        )
        self._max_rows = make(
            "Gauge",
            "batch_rows_limit",
            "Maximum rows of a call; occupancy is batch_rows divided by this.",
            "model",
        )
        self._load = make("Gauge", "model_load_seconds", "Time for opening the model.", "model")
        self._wait = make(
            "Histogram",
            "queue_wait_seconds",
            "Time from accepting an image to its first denoising step.",
            "model",
            buckets=_REQUEST_S,
        )
        self._step = make(
            "Histogram",
            "step_seconds",
            "Time of a denoiser call, including the update of its images.",
            "model",
            buckets=_STEP_S,
        )
        self._rows = make(
            "Histogram", "batch_rows", "Rows of images in a call.", "model", buckets=_ROWS
        )
        self._padding = make("Counter", "padding_rows", "Rows that padded a batch.", "model")
        self._images = make("Counter", "images", "Images drawn.", "model")
        self._requests = make(
            "Histogram",
            "request_seconds",
            "Time from the headers of a request to the end of its response.",
            "path",
            "status",
            buckets=_REQUEST_S,
        )
        self._models: list[ModelMetrics] = []
        self._errors = make("Counter", "errors", "Requests that failed or were refused.", "code")

    def model(
        self,
        name: str,
        load_seconds: float,
        *,
        under_way: Callable[[], int],
        waiting: Callable[[], int],
        max_rows: int,
    ) -> ModelMetrics:
        """Create the metrics of one model.

        Args:
            name: name of the model.
            load_seconds: time that opening the model took, in seconds.
            under_way: function that returns the number of accepted images that are not complete.
            waiting: function that returns the number of images that wait for a call.
            max_rows: maximum number of rows per denoiser call.
        """
        self._under_way.labels(name).set_function(under_way)
        self._waiting.labels(name).set_function(waiting)
        self._max_rows.labels(name).set(max_rows)
        self._load.labels(name).set(load_seconds)
        model_metrics = ModelMetrics(
            *(
                metric.labels(name)
                for metric in (self._wait, self._step, self._rows, self._padding, self._images)
            )
        )
        self._models.append(model_metrics)
        return model_metrics

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a response.

        Args:
            path: path of the route, not of the request, so that clients cannot create labels.
            status: HTTP status.
            seconds: time from the request to the response, in seconds.
        """
        self._requests.labels(path, str(status)).observe(seconds)

    def error(self, code: str) -> None:
        """Count a request that failed or was refused, by the error code of the response."""
        self._errors.labels(code).inc()

    def expose(self) -> bytes:
        """All metrics in Prometheus' text format."""
        for model in self._models:
            model.flush()
        text: bytes = self._expose(self.registry)
        return text


class ModelMetrics:
    """The metrics of one model, which observe its batcher."""

    def __init__(self, wait: Any, step: Any, rows: Any, padding: Any, images: Any) -> None:
        self._wait = wait
        self._step = step
        self._rows = rows
        self._padding = padding
        self._images = images
        self._calls: deque[tuple[float, int, int]] = deque()

    def called(self, seconds: float, rows: int, size: int) -> None:
        """Count a denoiser call.

        Args:
            seconds: duration of the call, in seconds.
            rows: number of rows that belong to images.
            size: batch size of the call, in rows, including padding.
        """
        # For a small model, updating Prometheus after every call would take a noticeable share of the
        # time.
        self._calls.append((seconds, rows, size))
        if len(self._calls) >= _CALLS_KEPT:
            self.flush()

    def flush(self) -> None:
        """Pass the collected calls on to Prometheus."""
        with suppress(IndexError):  # Another thread may have taken the last call.
            while True:
                seconds, rows, size = self._calls.popleft()
                self._step.observe(seconds)
                self._rows.observe(rows)
                if size > rows:
                    self._padding.inc(size - rows)

    def waited(self, seconds: float) -> None:
        """Count the queueing time of an image until its first denoising step, in seconds."""
        self._wait.observe(seconds)

    def drawn(self) -> None:
        """Count a complete image."""
        self._images.inc()
