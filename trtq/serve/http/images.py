"""`POST /v1/images/generations` and `/edits`: images in one response or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response

from trtq.png_text import generation_texts, with_texts
from trtq.serve.http.bodies import (
    ClientGoneError,
    Message,
    Receive,
    Send,
    content_type,
    read_body,
    while_connected,
)
from trtq.serve.http.edits import (
    EDITS_PATH,
    Pictures,
    Uploads,
    check_uploads,
    parse_edit,
    read_pictures,
)
from trtq.serve.http.errors import ApiError
from trtq.serve.http.multipart import FORM_TYPE
from trtq.serve.http.schema import ImageRequest, check_against, guidance_of, parse_request, size_of
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import GenerationRequest, ModelInfo
from trtq.serve.requests import DrawOptions, Event, ImageGenerator

__all__ = ["NOTES", "ClientGoneError", "Images", "Message", "Receive", "Send", "refusal"]

logger = logging.getLogger(__name__)

NOTES = "trtq"
"""Key of an ASGI scope whose value holds the fields of the request's log line."""


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
        body, uploads = await self._read(scope, receive)
        info = generator.find(body.model)
        check_uploads(uploads, info)
        check_against(body, info, generator.limits)
        pictures = None
        if uploads is not None:
            pictures = await asyncio.to_thread(read_pictures, uploads, body.size, info)
        request = _generation_request(body, info, pictures)
        notes |= {"model": info.name, "images": request.count, "steps": request.steps}
        options = DrawOptions(
            deadline_s=body.deadline,
            previews=body.partial_images or 0,
            progress=bool(body.progress),
        )
        events = generator.draw(info.name, request, options)
        if body.stream:
            # Waits for the first event, so that a refusal can still set the HTTP status.
            await while_connected(receive, anext(events))
            kind = "image_generation" if uploads is None else "image_edit"
            return _EventStream(_server_sent(events, request, info, self._metrics, kind))
        pngs = await while_connected(receive, _collect(events, request.count))
        data = [
            {"b64_json": _base64(_described(png, request, info, index))}
            for index, png in enumerate(pngs)
        ]
        fields = _response_fields(request, info)
        return JSONResponse({"created": int(time.time()), "data": data} | fields)

    async def _read(
        self, scope: Mapping[str, Any], receive: Receive
    ) -> tuple[ImageRequest, Uploads | None]:
        """The fields of a request, and the files of an edit."""
        limits = self._generator.limits
        if scope["path"] == EDITS_PATH:
            sent = await read_body(scope, receive, FORM_TYPE, limits.upload_bytes, limits.upload_s)
            return await asyncio.to_thread(parse_edit, content_type(scope), sent)
        sent = await read_body(scope, receive, "application/json", limits.body_bytes, limits.body_s)
        return parse_request(sent), None


def _generation_request(
    body: ImageRequest, info: ModelInfo, pictures: Pictures | None
) -> GenerationRequest:
    size = size_of(body, info)
    if pictures is not None and info.follows_image:
        size = pictures.size
    return GenerationRequest(
        prompt=body.prompt,
        count=body.n,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        steps=body.steps or info.steps,
        guidance=guidance_of(body, info),
        size=size,
        negative_prompt=body.negative_prompt,
        images=() if pictures is None else pictures.images,
        mask=None if pictures is None else pictures.mask,
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
    events: AsyncGenerator[Event],
    request: GenerationRequest,
    info: ModelInfo,
    metrics: Metrics,
    kind: str,
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
                    yield _sse(f"{kind}.partial_image", fields)
                else:
                    yield _sse(f"{kind}.completed", fields)
    except ApiError as error:
        metrics.error(error.code)
        _log_failure(error)
        yield _sse("error", {"type": "error"} | error.envelope)


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


class _EventStream(Response):
    """A response of server-sent events, which ends if the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await while_connected(receive, self._send(start, send))

    async def _send(self, start: Message, send: Send) -> None:
        await send(start)
        async with aclosing(self._chunks):
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
