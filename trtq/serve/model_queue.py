"""A model of a server with a bounded number of images in progress, however it draws them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from trtq.serve.http.errors import ApiError
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits
from trtq.serve.requests import DrawOptions

if TYPE_CHECKING:
    from trtq.serve.generation import CodecThread, Generation

__all__ = ["ModelQueue"]

_MAX_RETRY_S = 60


class ModelQueue(ABC):
    """Base class of served models: the limits, and the interface to the service.

    Args:
        info: description of the model.
        limits: limits of the server.
        metrics: metrics of the server.
        load_seconds: time that loading the model took, in seconds.
        waiting: function that returns the number of images that wait for a call.
        max_rows: maximum number of rows per denoiser call.

    Attributes:
        info: description of the model, within the limits of the server.
        metrics: metrics of the model.
        under_way: number of accepted images that are not complete.
    """

    def __init__(
        self,
        info: ModelInfo,
        limits: Limits,
        metrics: Metrics,
        *,
        load_seconds: float,
        waiting: Callable[[], int],
        max_rows: int,
    ) -> None:
        self.info = replace(
            info,
            steps=min(info.steps, limits.steps),
            max_steps=min(info.max_steps, limits.steps),
        )
        self.under_way = 0
        self.metrics = metrics.model(
            self.info.name,
            load_seconds,
            under_way=lambda: self.under_way,
            waiting=waiting,
            max_rows=max_rows,
        )
        self._max_under_way = limits.batch + limits.queue
        self._image_s = 0.0

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the thread that draws is running."""

    @property
    @abstractmethod
    def died(self) -> bool:
        """Whether the thread that draws ended because of an error."""

    @abstractmethod
    def generation(
        self, request: GenerationRequest, options: DrawOptions, codec: CodecThread
    ) -> Generation:
        """Accept a request.

        Args:
            request: the images to draw.
            options: delivery of the images: deadline, previews and progress events.
            codec: thread that encodes prompts and decodes images.

        Raises:
            ApiError: 429, the queue has no room for the images.
        """

    @abstractmethod
    def refuse(self, error: Exception) -> None:
        """Fail all current and future images with `error`."""

    @abstractmethod
    def close(self, error: Exception, seconds: float | None = None) -> bool:
        """Refuse all images and wait until the thread ends.

        Args:
            error: error with which the images fail.
            seconds: maximum waiting time, in seconds; None: no limit.

        Returns:
            Whether the thread ended in time.
        """

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
