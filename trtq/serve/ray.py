"""The same server on Ray Serve: replicas that draw, as many as the queue asks for, behind one HTTP face.

    serve run trtq.serve.ray:app path=onnx max_replicas=2

A request goes to one replica. If that dies, the request begins again on another: its seed is chosen
before, so the images are the same, and none that was passed on is passed on again. Ray itself reports
its use unless RAY_USAGE_STATS_ENABLED=0 is set where the cluster is started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtq._optional import require
from trtq.errors import UsageError
from trtq.serve.errors import ApiError
from trtq.serve.logs import FIELDS, log_to
from trtq.serve.metrics import Metrics
from trtq.serve.model import Card, Drawing
from trtq.serve.server import ServeOptions, build_service, read_api_key
from trtq.serve.service import Drawer, Event, Limits

__all__ = ["Front", "RayOptions", "RemoteDrawer", "Replica", "app"]

logger = logging.getLogger(__name__)
_TRIES = 10
_PAUSE_S = 0.2


class RayOptions(BaseModel):
    """Arguments of `serve run trtq.serve.ray:app`.

    Attributes:
        path: an ONNX folder, a run or a checkpoint, at the same place on every machine.
        name: what requests call it; by default the folder's name.
        provider: what runs it.
        threads: threads of one operator, and processors that Ray counts for a replica.
        batch: rows in one call of the denoiser.
        queue: images that may wait in each replica.
        min_replicas: when there is little to do.
        max_replicas: when there is much.
        target: requests under way in a replica above which another is started; by default `batch`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str | None = None
    provider: str | None = None
    threads: int = Field(1, ge=1)
    batch: int = Field(8, ge=2)
    queue: int = Field(64, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    target: float | None = Field(None, gt=0)

    @property
    def limits(self) -> Limits:
        """What a replica takes on."""
        return Limits(batch=self.batch, queue=self.queue)


def _parse(given: dict[str, Any]) -> RayOptions:
    try:
        options = RayOptions.model_validate(given)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(RayOptions.model_fields)
        raise UsageError(f"{name!r}: {first['msg'].lower()}; the arguments are {known}") from err
    if options.min_replicas > options.max_replicas:
        raise UsageError(
            f"min_replicas={options.min_replicas} is more than max_replicas={options.max_replicas}"
        )
    return options


class Replica:
    """Holds the model and draws."""

    def __init__(self, options: RayOptions) -> None:
        log_to()
        wanted = ServeOptions(
            path=options.path,
            name=options.name,
            provider=options.provider,
            threads=options.threads,
            limits=options.limits,
        )
        self._service = build_service(wanted, Metrics())

    async def cards(self) -> dict[str, Card]:
        """The models by name."""
        return self._service.cards

    async def process(self) -> int:
        """The id of the process."""
        return os.getpid()

    async def draw(
        self, name: str, drawing: Drawing, deadline_s: float, previews: int, progress: bool
    ) -> AsyncGenerator[Event | ApiError]:
        """The events of a request; what goes wrong is the last of them."""
        try:
            async for event in self._service.draw(
                name, drawing, deadline_s=deadline_s, previews=previews, progress=progress
            ):
                yield event
        except ApiError as error:
            yield error


class RemoteDrawer(Drawer):
    """Draws with replicas.

    Args:
        replicas: Ray's handle of the deployment.
        cards: models by name.
        limits: of one replica.
    """

    def __init__(self, replicas: Any, cards: dict[str, Card], limits: Limits) -> None:
        super().__init__(cards, limits)
        self._replicas = replicas.options(stream=True)

    async def draw(
        self,
        name: str,
        drawing: Drawing,
        *,
        deadline_s: float | None = None,
        previews: int = 0,
        progress: bool = False,
    ) -> AsyncGenerator[Event]:
        """See `Drawer`."""
        lost = require("ray").exceptions.RayActorError
        end = time.monotonic() + min(deadline_s or self.limits.deadline_s, self.limits.deadline_s)
        passed_on: set[tuple[str, int, int]] = set()
        for _ in range(_TRIES):
            left = max(end - time.monotonic(), 0.0)
            answers = self._replicas.draw.remote(name, drawing, left, previews, progress)
            try:
                async for event in answers:
                    if isinstance(event, ApiError):
                        raise event
                    what = event.kind, event.index, event.step
                    if what not in passed_on:
                        passed_on.add(what)
                        yield event
                return
            except lost:
                logger.warning("a replica was lost", extra={FIELDS: {"model": name}})
                await asyncio.sleep(_PAUSE_S)
            finally:
                answers.cancel()
        raise ApiError(503, "replicas_lost", "the replicas of this model keep failing; try again")


class Front:
    """Takes requests over HTTP and hands them on."""

    async def __init__(self, replicas: Any, limits: Limits) -> None:  # type: ignore[misc]
        log_to()
        self._drawer = RemoteDrawer(replicas, await replicas.cards.remote(), limits)

    def __serve_build_asgi_app__(self) -> Any:
        from trtq.serve.app import create_app

        return create_app(self._drawer, Metrics(), read_api_key(None))


def app(given: RayOptions | dict[str, Any]) -> Any:
    """The application that `serve run` starts.

    Args:
        given: options, or the `key=value` arguments of `serve run`.

    Raises:
        UsageError: one is unknown or out of range.
    """
    options = given if isinstance(given, RayOptions) else _parse(given)
    serve = require("ray").serve
    target = options.target or options.batch
    most = options.batch + options.queue
    replicas = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=most,
        ray_actor_options={"num_cpus": options.threads},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": target,
        },
    ).bind(options)
    # It only passes on; how much is taken on is for the replicas to say.
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        max_ongoing_requests=2 * most * options.max_replicas,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas, options.limits)
