"""The same server on Ray Serve: replicas that draw, as many as the queue asks for, behind one HTTP face.

    serve run trtq.serve.ray:app path=onnx max_replicas=2

or `trtq serve onnx --ray --replicas 1:2` (see `trtq.serve.ray.local`). A request goes to one replica.
If that dies, the request begins again on another: its seed is chosen before, so the images are the same,
and none that was passed on is passed on again. Ray itself reports its use unless
RAY_USAGE_STATS_ENABLED=0 is set where the cluster is started.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, SecretStr, ValidationError, create_model

from trtq._optional import require
from trtq.errors import UsageError
from trtq.serve.http.access import Access, allowed_hosts, allowed_origins
from trtq.serve.http.app import create_app
from trtq.serve.http.errors import ApiError
from trtq.serve.http.images import Message, Receive, Send
from trtq.serve.logs import FIELDS, log_to
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.server import ServeOptions, build_service, drain, read_api_key
from trtq.serve.service import Event, ImageGenerator, Limits, parse_batch_sizes, too_late

__all__ = ["Ingress", "RayOptions", "RemoteGenerator", "Replica", "app", "replicas_wanted"]

logger = logging.getLogger(__name__)
_TRIES = 10
_PAUSE_S = 0.2
_IMAGES = "images_under_way"
_REQUEST_ID = b"x-request-id"


@dataclass(frozen=True, kw_only=True)
class RayOptions(ServeOptions):
    """What a server on Ray Serve is asked for: each replica is a server of these options.

    `threads` are also the processors that Ray counts for a replica, 1 where it is None; `path` and
    `beside` lie at the same place on every machine; `host`, `port` and `drain_s` are for
    `trtq serve --ray` only.

    Attributes:
        min_replicas: when there is little to do.
        max_replicas: when there is much.
        target: images under way in a replica above which another is started; by default a full batch.
        upscale_delay_s: more is wanted for so long before a replica is started.
        downscale_delay_s: less is wanted for so long before one ends.
        look_back_s: images under way are averaged over so long.
    """

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 2
    target: Annotated[float, Field(gt=0)] | None = None
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    look_back_s: Annotated[float, Field(gt=0)] = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UsageError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} are no range; "
                "the first is at least 1 and not more than the second"
            )


_LISTS = {"allowed_hosts": allowed_hosts, "allowed_origins": allowed_origins}
_ELSEWHERE = ("host", "port", "drain_s", "api_key", "limits", *_LISTS)
"""Not said by arguments of `serve run`: those are Ray's own, or given otherwise."""


def _arguments() -> dict[str, Any]:
    """Type and default of each argument of `serve run`: fields of the options and of their limits."""
    known = {}
    for cls in (RayOptions, Limits):
        hints = get_type_hints(cls, include_extras=True)
        for one in fields(cls):
            if one.name not in _ELSEWHERE:
                known[one.name] = hints[one.name], ... if one.name == "path" else one.default
    known |= {"batch_sizes": (str | None, None), "api_key_file": (Path | None, None)}
    return known | dict.fromkeys(_LISTS, (str, ""))


def _parse(given: dict[str, Any]) -> RayOptions:
    """The options of `key=value` arguments."""
    config = ConfigDict(extra="forbid")
    known = _arguments()
    try:
        values = dict(create_model("Arguments", __config__=config, **known)(**given))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{name!r}: {first['msg'].lower()}; the arguments are {', '.join(known)}"
        ) from err
    key = read_api_key(values.pop("api_key_file"))
    for name, read in _LISTS.items():
        values[name] = read(text for text in values[name].split(",") if text.strip())
    limits = {one.name: values.pop(one.name) for one in fields(Limits)}
    if limits["batch_sizes"] is not None:
        limits["batch_sizes"] = parse_batch_sizes(limits["batch_sizes"], limits["batch"])
    return RayOptions(**values, api_key=key, limits=Limits(**limits))


class Replica:
    """Holds the models and draws."""

    def __init__(self, options: RayOptions) -> None:
        log_to()
        self._service = build_service(options, Metrics())

    async def infos(self) -> dict[str, ModelInfo]:
        """The models by name."""
        return self._service.infos

    async def process(self) -> int:
        """The id of the process."""
        return os.getpid()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `replicas_wanted` goes by; Ray Serve asks for it every few seconds."""
        return {_IMAGES: self._service.under_way}

    async def draw(
        self,
        name: str,
        drawing: GenerationRequest,
        deadline_s: float,
        previews: int,
        progress: bool,
    ) -> AsyncGenerator[Event | ApiError]:
        """The events of a request; what goes wrong is the last of them."""
        begun = time.monotonic()
        left = drawing.count
        try:
            async for event in self._service.draw(
                name, drawing, deadline_s=deadline_s, previews=previews, progress=progress
            ):
                left -= event.kind == "image"
                if not left:
                    # Which replica drew what, and how often: the answer may still get lost with it.
                    seconds = round(time.monotonic() - begun, 4)
                    facts = {"model": name, "images": drawing.count, "steps": drawing.steps}
                    facts |= {"seed": drawing.seed, "seconds": seconds}
                    logger.info("drawn", extra={FIELDS: facts})
                yield event
        except ApiError as error:
            yield error


def replicas_wanted(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy: so many replicas that each has `target` images under way.

    Requests would not do: one may ask for ten images. Those that no replica has taken yet count as one
    image each. Ray Serve applies delays and bounds itself.

    Args:
        context: Ray Serve's `AutoscalingContext`.
    """
    images = (context.aggregated_metrics or {}).get(_IMAGES)
    if not images:  # No replica has told yet.
        return context.target_num_replicas, {}
    under_way = sum(images.values()) + context.total_queued_requests
    return under_way / context.config.target_ongoing_requests, {}


class RemoteGenerator(ImageGenerator):
    """Draws with replicas.

    Args:
        replicas: Ray's handle of the deployment.
        infos: models by name.
        limits: of one replica.
    """

    def __init__(self, replicas: Any, infos: dict[str, ModelInfo], limits: Limits) -> None:
        super().__init__(infos, limits)
        self._replicas = replicas.options(stream=True)
        self._under_way = 0
        self._waiting: set[asyncio.Future[Event | ApiError | None]] = set()

    @property
    def under_way(self) -> int:
        """See `ImageGenerator`."""
        return self._under_way

    def give_up(self) -> None:
        """See `ImageGenerator`."""
        for one in list(self._waiting):
            one.cancel()

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
        lost = require("ray").exceptions.RayActorError
        longest = min(math.inf if deadline_s is None else deadline_s, self.limits.deadline_s)
        end = time.monotonic() + longest
        passed_on: set[tuple[str, int, int]] = set()
        self._under_way += drawing.count
        try:
            for _ in range(_TRIES):
                left = end - time.monotonic()
                if left <= 0:
                    raise too_late(longest)
                answers = self._replicas.draw.remote(name, drawing, left, previews, progress)
                finished = False
                try:
                    events = aiter(answers)
                    while (event := await self._next(events, end, longest)) is not None:
                        what = event.kind, event.index, event.step
                        if what not in passed_on:
                            passed_on.add(what)
                            yield event
                    finished = True
                    return
                except lost:
                    logger.warning("a replica was lost", extra={FIELDS: {"model": name}})
                finally:
                    if not finished:  # Otherwise that would be one more call for nothing.
                        answers.cancel()
                await asyncio.sleep(_PAUSE_S)
            text = "the replicas of this model keep failing; try again"
            raise ApiError(503, "replicas_lost", text)
        finally:
            self._under_way -= drawing.count

    async def _next(
        self, events: AsyncIterator[Event | ApiError], end: float, longest: float
    ) -> Event | None:
        """The next event of a replica, or None at the end.

        Raises:
            ApiError: what the replica answers; 408 when `end` is past, whether or not it answers; 503
                when it is given up.
        """
        coming = asyncio.ensure_future(anext(events, None))
        self._waiting.add(coming)
        try:
            await asyncio.wait((coming,), timeout=max(end - time.monotonic(), 0))
            if not coming.done():
                raise too_late(longest)
            if coming.cancelled():
                self.refuse_when_draining()
            event = coming.result()
        finally:
            self._waiting.discard(coming)
            coming.cancel()
        if isinstance(event, ApiError):
            raise event
        return event


class Ingress:
    """Takes requests over HTTP and hands them on.

    Args:
        replicas: Ray's handle of the deployment.
        limits: of one replica.
        api_key: what requests to `/v1` have to bring; a secret, so that no message and no page shows it.
        access: the hosts and origins that are answered to.
    """

    async def __init__(  # type: ignore[misc]
        self, replicas: Any, limits: Limits, api_key: SecretStr | None, access: Access
    ) -> None:
        log_to()
        self._drawer = RemoteGenerator(replicas, await replicas.infos.remote(), limits)
        key = None if api_key is None else api_key.get_secret_value()
        self._app = create_app(self._drawer, Metrics(), key, access)
        for text in access.warnings:
            logger.warning(text)
        facts = {"models": list(self._drawer.infos), "api_key": key is not None}
        logger.info("ready", extra={FIELDS: facts})

    async def models(self) -> list[str]:
        """Their names."""
        return list(self._drawer.infos)

    async def drain(self, seconds: float) -> None:
        """Finish what was taken on; answer the rest, and what still comes, with 503."""
        await drain(self._drawer, seconds)

    async def answer(self, scope: Any, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        names = {name for name, _ in scope["headers"]}
        more = b"content-length" in names or b"transfer-encoding" in names

        async def receive_on() -> Message:
            nonlocal more
            message = await receive()
            more = more and bool(message.get("more_body"))
            return message

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Ray Serve names the request itself, by the same id.
                message["headers"] = [one for one in message["headers"] if one[0] != _REQUEST_ID]
                if more:
                    # Its proxy would go on reading what nobody wants.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        await self._app(scope, receive_on, send_on)


async def _answer(scope: Any, receive: Receive, send: Send) -> None:
    """The ASGI application of the process's `Ingress`."""
    if scope["type"] == "http":
        front = require("ray.serve").get_replica_context().servable_object
        await front.answer(scope, receive, send)


def app(given: RayOptions | dict[str, Any]) -> Any:
    """The application that `serve run` starts.

    Args:
        given: options, or the `key=value` arguments of `serve run`: fields of `RayOptions` and `Limits`,
            and `api_key_file`. Without that the key is TRTQ_API_KEY of the process that calls this.

    Raises:
        UsageError: one is unknown or out of range.
    """
    options = given if isinstance(given, RayOptions) else _parse(given)
    key = None if options.api_key is None else SecretStr(options.api_key)
    serve = require("ray.serve")
    limits = options.limits
    most = limits.batch + limits.queue
    threads = options.threads or 1
    replicas = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=most,
        # One that has to end first finishes what it has.
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": threads},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target or limits.batch,
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
            "look_back_period_s": options.look_back_s,
            "policy": {"policy_function": f"{__name__}:{replicas_wanted.__name__}"},
        },
    ).bind(replace(options, api_key=None, threads=threads))
    # It only passes on; how much is taken on is for the replicas to say.
    front = serve.deployment(
        serve.ingress(lambda: _answer)(Ingress),
        name="Front",
        max_ongoing_requests=2 * most * options.max_replicas,
        graceful_shutdown_timeout_s=limits.deadline_s,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas, limits, key, options.access)
