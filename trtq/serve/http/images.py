"""`POST /v1/images/generations`: JSON in, images out, in one response or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response

from trtq.png_text import generation_texts, with_texts
from trtq.serve.http.errors import ApiError
from trtq.serve.http.schema import ImageRequest, check_against, guidance_of, parse_request, size_of
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.options import Limits
from trtq.serve.requests import DrawOptions, Event, ImageGenerator

__all__ = ["NOTES", "ClientGoneError", "Images", "Message", "Receive", "Send", "refusal"]

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

NOTES = "trtq"
"""Key of an ASGI scope whose value holds the fields of the request's log line."""
_DISCARDED = 16
"""Factor by which a body may exceed its limit before the server stops reading and discarding it."""


class ClientGoneError(Exception):
    """The client closed the connection before the response."""


def refusal(error: ApiError, metrics: Metrics) -> JSONResponse:
    """The response to a request that is refused or failed.

    Args:
        error: error to send.
        metrics: metrics in which the error is counted.
    """
    metrics.error(error.code)
    return JSONResponse(error.envelope, error.status, error.headers)


def _log_failure(error: ApiError) -> None:
    if error.status == 500:
        logger.error("request failed", exc_info=error.__cause__ or error)


class Images:
    """Answers requests for images.

    Args:
        generator: the image generator.
        metrics: metrics of the server.
    """

    def __init__(self, generator: ImageGenerator, metrics: Metrics) -> None:
        self._generator = generator
        self._metrics = metrics

    async def answer(self, scope: Mapping[str, Any], receive: Receive) -> Response:
        """The response to a request, which may be an error.

        Args:
            scope: ASGI scope of the request, with a dict under `NOTES`.
            receive: ASGI function that returns the parts of the body.

        Raises:
            ClientGoneError: the client closed the connection.
        """
        notes = scope[NOTES]
        try:
            return await self._draw(scope, receive, notes)
        except ApiError as error:
            notes["error"] = error.code
            _log_failure(error)
            return refusal(error, self._metrics)

    async def _draw(
        self, scope: Mapping[str, Any], receive: Receive, notes: dict[str, Any]
    ) -> Response:
        generator = self._generator
        generator.refuse_when_draining()
        body = parse_request(await _read_body(scope, receive, generator.limits))
        info = generator.find(body.model)
        check_against(body, info, generator.limits)
        request = _generation_request(body, info)
        notes |= {"model": info.name, "images": request.count, "steps": request.steps}
        options = DrawOptions(
            deadline_s=body.deadline,
            previews=body.partial_images or 0,
            progress=bool(body.progress),
        )
        events = generator.draw(info.name, request, options)
        if body.stream:
            # Waits for the first event, so that a refusal can still set the HTTP status.
            await _while_connected(receive, anext(events))
            return _EventStream(_server_sent(events, request, info, self._metrics))
        pngs = await _while_connected(receive, _collect(events, request.count))
        data = [
            {"b64_json": _base64(_described(png, request, info, index))}
            for index, png in enumerate(pngs)
        ]
        fields = _response_fields(request, info)
        return JSONResponse({"created": int(time.time()), "data": data} | fields)


def _generation_request(body: ImageRequest, info: ModelInfo) -> GenerationRequest:
    return GenerationRequest(
        prompt=body.prompt,
        count=body.n,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        steps=body.steps or info.steps,
        guidance=guidance_of(body, info),
        size=size_of(body, info),
        negative_prompt=body.negative_prompt,
    )


def _response_fields(request: GenerationRequest, info: ModelInfo) -> dict[str, Any]:
    """The fields of a response other than the images: OpenAI's fields, then ours."""
    height, width = request.size or info.image_size
    return {
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": f"{width}x{height}",
        "model": info.name,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
    }


def _described(png: bytes, request: GenerationRequest, info: ModelInfo, index: int) -> bytes:
    """Add prompt, seed and settings to a PNG file as text chunks."""
    texts = generation_texts(
        model=info.name,
        prompt=request.prompt if info.kind == "text" else None,
        label=request.prompt if info.kind == "class" else None,
        seed=request.seed,
        image=index,
        steps=request.steps,
        guidance=request.guidance,
        size=request.size or info.image_size,
        negative_prompt=request.negative_prompt,
    )
    return with_texts(png, texts)


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


async def _collect(events: AsyncGenerator[Event], count: int) -> list[bytes]:
    """The PNG files of all images of a request, by index."""
    pngs = [b""] * count
    async with aclosing(events):
        async for event in events:
            if event.kind == "image":
                pngs[event.index] = event.png
    return pngs


async def _server_sent(
    events: AsyncGenerator[Event], request: GenerationRequest, info: ModelInfo, metrics: Metrics
) -> AsyncGenerator[bytes]:
    """The events of a request in OpenAI's format, and `trtq.progress` events if requested."""
    previews = [0] * request.count
    try:
        async with aclosing(events):
            async for event in events:
                fields: dict[str, Any] = {"image_index": event.index, "step": event.step}
                if event.kind == "progress":
                    yield _sse("trtq.progress", fields | {"steps": event.steps})
                    continue
                png = event.png
                if event.kind == "image":
                    png = _described(png, request, info, event.index)
                fields |= {"b64_json": _base64(png), "created_at": int(time.time())}
                fields |= _response_fields(request, info)
                if event.kind == "preview":
                    fields["partial_image_index"] = previews[event.index]
                    previews[event.index] += 1
                    yield _sse("image_generation.partial_image", fields)
                else:
                    yield _sse("image_generation.completed", fields)
    except ApiError as error:
        metrics.error(error.code)
        _log_failure(error)
        yield _sse("error", {"type": "error"} | error.envelope)


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


async def _read_body(scope: Mapping[str, Any], receive: Receive, limits: Limits) -> bytes:
    """Read the body of a request, of limited size and in limited time.

    Raises:
        ApiError: 408 the body takes too long; 413 it is too large; 415 it is not JSON.
        ClientGoneError: the client closed the connection.
    """
    content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body must be application/json, got {media_type[:80] or 'no content type'!r}",
        )
    body = bytearray()
    size = 0
    more = True
    try:
        async with asyncio.timeout(limits.body_s):
            # A client does not read the response while it sends: read and discard part of a large body.
            while more and size <= _DISCARDED * limits.body_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                if size <= limits.body_bytes:
                    body += chunk
                more = message.get("more_body", False)
    except TimeoutError as err:
        raise ApiError(
            408, "body_timeout", f"the body did not arrive within {limits.body_s:g} s"
        ) from err
    if size > limits.body_bytes:
        text = f"the body may have up to {limits.body_bytes} bytes"
        raise ApiError(413, "body_too_large", text)
    return bytes(body)


async def _while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work` and return its result; cancel it if the client closes the connection.

    Raises:
        ClientGoneError: the client closed the connection.
    """
    working = asyncio.current_task()
    assert working is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError as err:
        if gone and not working.uncancel():
            raise ClientGoneError from err
        raise
    finally:
        watching.cancel()


class _EventStream(Response):
    """A response of server-sent events, which ends if the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await _while_connected(receive, self._send(start, send))

    async def _send(self, start: Message, send: Send) -> None:
        await send(start)
        async with aclosing(self._chunks):
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
