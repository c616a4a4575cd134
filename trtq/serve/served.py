"""One model of a server: its batcher, its metrics and its bounded queue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from trtq.serve.batcher import Batcher
from trtq.serve.http.errors import ApiError
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import ImageModel
from trtq.serve.options import Batching, Limits

__all__ = ["ServedModel"]

_MAX_RETRY_S = 60


class ServedModel:
    """A model with its batcher and a bounded number of images in progress.

    Args:
        model: the model, loaded and warmed up.
        limits: limits of the server.
        batching: batching strategy, see `Batcher`.
        metrics: metrics of the server.
        sizes: batch sizes that the model is ready for; None: any size.
        more_sizes: whether further sizes will follow, see `Batcher.add_size`.
        load_seconds: time that loading the model took, in seconds.
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
        self.info = replace(
            model.info,
            steps=min(model.info.steps, limits.steps),
            max_steps=min(model.info.max_steps, limits.steps),
        )
        self.under_way = 0
        self.metrics = metrics.model(
            self.info.name,
            load_seconds,
            under_way=lambda: self.under_way,
            waiting=lambda: self.batcher.waiting,
            max_rows=limits.batch,
        )
        self._max_under_way = limits.batch + limits.queue
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
        """Reserve room for `count` images.

        Raises:
            ApiError: 429, the queue has no room for them.
        """
        if self.under_way + count > self._max_under_way:
            wait = math.ceil(self._image_s * self.under_way) or 1
            raise ApiError(
                429,
                "queue_full",
                f"{self.info.name} has {self.under_way} images in progress and accepts "
                f"{self._max_under_way} at once; try again later",
                retry_after=min(wait, _MAX_RETRY_S),
            )
        self.under_way += count

    def finished(self, seconds: float) -> None:
        """Update the average time per image, in seconds, from which `Retry-After` is computed."""
        image_s = seconds / max(1, self.under_way)
        self._image_s = image_s if not self._image_s else 0.9 * self._image_s + 0.1 * image_s
