"""`POST /v1/images/generations`: a body in, pictures out, at once or as server-sent events."""

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
from trtq.serve.service import Event, ImageGenerator, Limits

__all__ = ["NOTES", "ClientGoneError", "Images", "Message", "Receive", "Send", "refusal"]

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

NOTES = "trtq"
"""Where an ASGI scope keeps what the log will say about a request."""
_DISCARDED = 16


class ClientGoneError(Exception):
    """The client hung up before the answer."""


def refusal(error: ApiError, metrics: Metrics) -> JSONResponse:
    """The answer to a request that is not served."""
    metrics.error(error.code)
    return JSONResponse(error.envelope, error.status, error.headers)


def _log_failure(error: ApiError) -> None:
    if error.status == 500:
        logger.error("request failed", exc_info=error.__cause__ or error)


class Images:
    """Answers requests for images.

    Args:
        service: draws.
        metrics: what `/metrics` shows.
    """

    def __init__(self, service: ImageGenerator, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    async def answer(self, scope: Mapping[str, Any], receive: Receive) -> Response:
        """What to send, a refusal if need be.

        Raises:
            ClientGoneError: nobody is there to read it.
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
        service = self._service
        service.refuse_when_draining()
        wanted = parse_request(await _read_body(scope, receive, service.limits))
        info = service.find(wanted.model)
        check_against(wanted, info, service.limits)
        drawing = _drawing(wanted, info)
        notes |= {"model": info.name, "images": drawing.count, "steps": drawing.steps}
        events = service.draw(
            info.name,
            drawing,
            deadline_s=wanted.deadline,
            previews=wanted.partial_images or 0,
            progress=bool(wanted.progress),
        )
        if wanted.stream:
            # Refusals come before the first byte of an answer.
            await _while_connected(receive, anext(events))
            return _EventStream(_server_sent(events, drawing, info, self._metrics))
        pictures = await _while_connected(receive, _pictures(events, drawing.count))
        data = [
            {"b64_json": _base64(_described(png, drawing, info, index))}
            for index, png in enumerate(pictures)
        ]
        return JSONResponse({"created": int(time.time()), "data": data} | _facts(drawing, info))


def _drawing(wanted: ImageRequest, info: ModelInfo) -> GenerationRequest:
    return GenerationRequest(
        prompt=wanted.prompt,
        count=wanted.n,
        seed=secrets.randbelow(2**31) if wanted.seed is None else wanted.seed,
        steps=wanted.steps or info.steps,
        guidance=guidance_of(wanted, info),
        size=size_of(wanted, info),
        negative_prompt=wanted.negative_prompt,
    )


def _facts(drawing: GenerationRequest, info: ModelInfo) -> dict[str, Any]:
    """What an answer says beside the pictures: OpenAI's fields, then ours."""
    height, width = drawing.size or info.image_size
    return {
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": f"{width}x{height}",
        "model": info.name,
        "seed": drawing.seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
    }


def _described(png: bytes, drawing: GenerationRequest, info: ModelInfo, index: int) -> bytes:
    """The file of one picture, with what made it as text inside."""
    text = info.kind == "text"
    texts = generation_texts(
        model=info.name,
        prompt=drawing.prompt if text else None,
        label=drawing.prompt if info.kind == "class" else None,
        seed=drawing.seed,
        image=index,
        steps=drawing.steps,
        guidance=drawing.guidance,
        size=drawing.size or info.image_size,
        negative_prompt=drawing.negative_prompt,
    )
    return with_texts(png, texts)


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


async def _pictures(events: AsyncGenerator[Event], count: int) -> list[bytes]:
    found = [b""] * count
    async with aclosing(events):
        async for event in events:
            if event.kind == "image":
                found[event.index] = event.png
    return found


async def _server_sent(
    events: AsyncGenerator[Event], drawing: GenerationRequest, info: ModelInfo, metrics: Metrics
) -> AsyncGenerator[bytes]:
    """A request's events as OpenAI's clients read them, `trtq.progress` beside them if asked for."""
    shown = [0] * drawing.count
    try:
        async with aclosing(events):
            async for event in events:
                facts: dict[str, Any] = {"image_index": event.index, "step": event.step}
                if event.kind == "progress":
                    yield _sse("trtq.progress", facts | {"steps": event.steps})
                    continue
                png = event.png
                if event.kind == "image":
                    png = _described(png, drawing, info, event.index)
                facts |= {"b64_json": _base64(png), "created_at": int(time.time())}
                facts |= _facts(drawing, info)
                if event.kind == "preview":
                    facts["partial_image_index"] = shown[event.index]
                    shown[event.index] += 1
                    yield _sse("image_generation.partial_image", facts)
                else:
                    yield _sse("image_generation.completed", facts)
    except ApiError as error:
        metrics.error(error.code)
        _log_failure(error)
        yield _sse("error", {"type": "error"} | error.envelope)


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


async def _read_body(scope: Mapping[str, Any], receive: Receive, limits: Limits) -> bytes:
    """The whole body, of bounded size and in bounded time.

    Raises:
        ApiError: 408, 413 or 415.
        ClientGoneError: it does not come.
    """
    given = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body must be application/json, got {kind[:80] or 'no content type'!r}",
        )
    body = bytearray()
    come = 0
    more = True
    try:
        async with asyncio.timeout(limits.body_s):
            # A client that is still sending does not read: some more is taken and thrown away.
            while more and come <= _DISCARDED * limits.body_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                come += len(chunk)
                if come <= limits.body_bytes:
                    body += chunk
                more = message.get("more_body", False)
    except TimeoutError as err:
        raise ApiError(
            408, "body_timeout", f"the body did not come within {limits.body_s:g} s"
        ) from err
    if come > limits.body_bytes:
        raise ApiError(413, "body_too_large", f"the body may have {limits.body_bytes} bytes")
    return bytes(body)


async def _while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled when the client hangs up.

    Raises:
        ClientGoneError: it did.
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
    """Server-sent events that end when the client hangs up."""

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
