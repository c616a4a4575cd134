"""The server on Ray Serve: replicas that draw, autoscaled with the queue, behind one HTTP ingress.

    serve run trtq.serve.ray:app path=onnx max_replicas=2

or `trtq serve onnx --ray --replicas 1:2` (see `trtq.serve.ray.local`). One replica handles a request.
If that replica dies, another replica restarts the request. The ingress chooses the seed, so the images
are the same, and no image is sent twice. Ray sends usage statistics to its developers unless
RAY_USAGE_STATS_ENABLED=0 is set where the cluster is started.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from pydantic import SecretStr

from trtq._optional import require
from trtq.serve.hosting import build_service
from trtq.serve.http.access import Access
from trtq.serve.http.app import create_app
from trtq.serve.http.errors import ApiError
from trtq.serve.http.images import Message, Receive, Send
from trtq.serve.logs import FIELDS, log_to
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits
from trtq.serve.ray.generator import RemoteGenerator
from trtq.serve.ray.options import RayOptions, parse_arguments
from trtq.serve.requests import DrawOptions, Event
from trtq.serve.server import drain

__all__ = ["Ingress", "Replica", "app", "replicas_wanted"]

logger = logging.getLogger(__name__)
_IMAGES = "images_under_way"
_REQUEST_ID = b"x-request-id"


class Replica:
    """A process that holds the models and draws images.

    Args:
        options: options of the server.
    """

    def __init__(self, options: RayOptions) -> None:
        log_to()
        self._service = build_service(options, Metrics())

    async def models(self) -> dict[str, ModelInfo]:
        """The model descriptions by name, the default model first."""
        return self._service.models

    async def process(self) -> int:
        """The id of the replica's process."""
        return os.getpid()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The input of `replicas_wanted`, which Ray Serve polls every few seconds."""
        return {_IMAGES: self._service.under_way}

    async def draw(
        self, name: str, request: GenerationRequest, options: DrawOptions
    ) -> AsyncGenerator[Event | ApiError]:
        """Yield the events of a request; an error is always the last event.

        Args:
            name: name of the model.
            request: the images to draw.
            options: delivery of the images: deadline, previews and progress events.
        """
        begun = time.monotonic()
        remaining = request.count
        try:
            async for event in self._service.draw(name, request, options):
                remaining -= event.kind == "image"
                if not remaining:
                    # Log which replica drew which image: a replica may die before it has sent the
                    # image.
                    seconds = round(time.monotonic() - begun, 4)
                    fields = {"model": name, "images": request.count, "steps": request.steps}
                    fields |= {"seed": request.seed, "seconds": seconds}
                    logger.info("drawn", extra={FIELDS: fields})
                yield event
        except ApiError as error:
            yield error


def replicas_wanted(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy: the images in progress divided by the images per replica.

    The number of requests would be too coarse, since a request may be for ten images. A request that
    waits for a replica counts as one image. Ray Serve itself applies the delays and limits.

    Args:
        context: Ray Serve's `AutoscalingContext`.

    Returns:
        The number of replicas, and the state of the policy, which is empty.
    """
    images = (context.aggregated_metrics or {}).get(_IMAGES)
    if not images:  # No replica has reported yet.
        return context.target_num_replicas, {}
    under_way = sum(images.values()) + context.total_queued_requests
    return under_way / context.config.target_ongoing_requests, {}


class Ingress:
    """Receives HTTP requests and passes them to the replicas.

    Args:
        replicas: Ray's handle of the deployment.
        limits: limits of one replica.
        api_key: key that requests to `/v1` must send, wrapped as a secret to keep it out of messages
            and dashboards.
        access: hosts and origins that the server answers to.
    """

    async def __init__(  # type: ignore[misc]
        self, replicas: Any, limits: Limits, api_key: SecretStr | None, access: Access
    ) -> None:
        log_to()
        self._generator = RemoteGenerator(replicas, await replicas.models.remote(), limits)
        key = None if api_key is None else api_key.get_secret_value()
        self._app = create_app(self._generator, Metrics(), key, access)
        for text in access.warnings:
            logger.warning(text)
        fields = {"models": list(self._generator.models), "api_key": key is not None}
        logger.info("ready", extra={FIELDS: fields})

    async def model_names(self) -> list[str]:
        """The names of the models, the default model first."""
        return list(self._generator.models)

    async def drain(self, seconds: float) -> None:
        """Finish accepted requests; answer the rest and all new requests with 503.

        Args:
            seconds: maximum time for finishing accepted requests.
        """
        await drain(self._generator, seconds)

    async def answer(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer an HTTP request, as ASGI defines it."""
        names = {name for name, _ in scope["headers"]}
        more = b"content-length" in names or b"transfer-encoding" in names

        async def receive_on() -> Message:
            nonlocal more
            message = await receive()
            more = more and bool(message.get("more_body"))
            return message

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Ray Serve adds the same request id itself.
                headers = [header for header in message["headers"] if header[0] != _REQUEST_ID]
                if more:
                    # Ray Serve's proxy would keep reading a body that the application discards.
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive_on, send_on)


async def _answer(scope: Any, receive: Receive, send: Send) -> None:
    """The ASGI application of the process's `Ingress`."""
    if scope["type"] == "http":
        ingress = require("ray.serve").get_replica_context().servable_object
        await ingress.answer(scope, receive, send)


def app(given: RayOptions | dict[str, Any]) -> Any:
    """The application that `serve run` starts.

    Args:
        given: options, or the `key=value` arguments of `serve run`: fields of `RayOptions` and `Limits`,
            and `api_key_file`. Without `api_key_file` the key is the caller's TRTQ_API_KEY.

    Raises:
        UsageError: an argument is unknown or out of range.
    """
    options = given if isinstance(given, RayOptions) else parse_arguments(given)
    key = None if options.api_key is None else SecretStr(options.api_key)
    serve = require("ray.serve")
    limits = options.limits
    max_images = limits.batch + limits.queue
    threads = options.threads or 1
    replicas = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=max_images,
        # A replica that must stop finishes its requests first.
        graceful_shutdown_timeout_s=limits.deadline_s,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": threads},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.images_per_replica or limits.batch,
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
            "look_back_period_s": options.look_back_s,
            "policy": {"policy_function": f"{__name__}:{replicas_wanted.__name__}"},
        },
    ).bind(replace(options, api_key=None, threads=threads))
    # The ingress only passes requests on; the replicas decide how many they accept.
    ingress = serve.deployment(
        serve.ingress(lambda: _answer)(Ingress),
        name="Ingress",
        max_ongoing_requests=2 * max_images * options.max_replicas,
        graceful_shutdown_timeout_s=limits.deadline_s,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas, limits, key, options.access)
