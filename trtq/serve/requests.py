"""The interface between the HTTP layer and an image generator: a request in, events out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from trtq.serve.http.errors import ApiError
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits

__all__ = ["DrawOptions", "Event", "ImageGenerator", "draining_error", "too_late"]


@dataclass(frozen=True)
class Event:
    """An event of one image of a request.

    Attributes:
        kind: `accepted`, `progress`, `preview` or `image`.
        index: index of the image in its request.
        step: number of completed denoising steps.
        steps: total number of denoising steps.
        png: PNG file of a `preview` or an `image`.
    """

    kind: str
    index: int
    step: int
    steps: int
    png: bytes = b""


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How the images of a request are delivered.

    Attributes:
        deadline_s: time from now to the last image, in seconds; None: the server's limit, which is also
            the maximum.
        previews: number of preview pictures per image before it is complete.
        progress: whether to send an event after each denoising step.
    """

    deadline_s: float | None = None
    previews: int = 0
    progress: bool = False


class ImageGenerator(ABC):
    """The interface between the HTTP layer and an image generator.

    Args:
        models: model descriptions by name, the default model first.
        limits: limits on requests.
    """

    def __init__(self, models: Mapping[str, ModelInfo], limits: Limits) -> None:
        self.models = dict(models)
        self.limits = limits
        self.draining = False

    @property
    def alive(self) -> bool:
        """Whether the generator is able to draw."""
        return True

    @property
    @abstractmethod
    def under_way(self) -> int:
        """Number of accepted images that are not complete."""

    @abstractmethod
    def give_up(self) -> None:
        """Answer all requests in progress with 503."""

    def refuse_when_draining(self) -> None:
        """Raise if the server is about to stop.

        Raises:
            ApiError: 503, the server is about to stop.
        """
        if self.draining:
            raise draining_error()

    def find(self, name: str | None) -> ModelInfo:
        """Return the model with this name, or the default model for None.

        Raises:
            ApiError: 404, the server has no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {name[:80]!r} here; there is {', '.join(self.models)}",
                param="model",
            )
        return self.models[name]

    @abstractmethod
    def draw(
        self, name: str, request: GenerationRequest, options: DrawOptions
    ) -> AsyncGenerator[Event]:
        """Draw the images of a request; closing the iterator cancels the images that are not complete.

        The first event reports that the request is accepted: it is valid, and the queue has room for it.

        Args:
            name: name of the model.
            request: the images to draw.
            options: delivery of the images: deadline, previews and progress events.

        Raises:
            ApiError: 400 the model cannot draw these images; 408 the deadline passed; 429 the queue is
                full; 503 the server is about to stop; 500 the model failed.
        """


def too_late(seconds: float) -> ApiError:
    """The error of a request whose images are not complete `seconds` after its arrival."""
    return ApiError(
        408,
        "deadline_exceeded",
        f"the images were not done within {seconds:g} s; ask for fewer images or steps, or try later",
    )


def draining_error() -> ApiError:
    """The error of a request that arrives when the server is about to stop."""
    return ApiError(503, "draining", "this server is about to stop; try again", retry_after=1)
