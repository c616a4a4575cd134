"""The HTTP face: OpenAI's images, KServe's health, Prometheus' metrics and the page to try it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from dataclasses import asdict
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import trtq
from trtq.serve.errors import ApiError
from trtq.serve.logs import FIELDS
from trtq.serve.metrics import Metrics
from trtq.serve.model import Card, Drawing
from trtq.serve.schema import ImageRequest, check_against, guidance_of, parse_request, size_of
from trtq.serve.service import Drawer, Event

__all__ = ["create_app"]

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

_GONE = 499
_DISCARDED = 16
_NOTES = "trtq"
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


class ClientGoneError(Exception):
    """The client hung up before the answer."""


def create_app(service: Drawer, metrics: Metrics, api_key: str | None = None) -> Any:
    """The ASGI application.

    Args:
        service: draws.
        metrics: what `/metrics` shows.
        api_key: what requests to `/v1` have to bring; None: nothing.
    """
    app = FastAPI(
        title="trtq",
        version=trtq.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_images(app, service, metrics)
    _add_models(app, service)
    _add_health(app, service, metrics)
    _add_page(app)
    _add_error_handlers(app, metrics)
    return _Guard(app, metrics, api_key)


def _add_images(app: FastAPI, service: Drawer, metrics: Metrics) -> None:
    schema = ImageRequest.model_json_schema()
    refusals = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for status, text in {
            400: "The request is not understood; `param` names the field.",
            401: "The API key is missing or wrong.",
            404: "There is no such model.",
            408: "The body or the images took too long.",
            413: "The body is too large.",
            415: "The body is no JSON.",
            429: "Too many images are under way; see Retry-After.",
            503: "The server is about to stop.",
        }.items()
    }

    @app.post(
        "/v1/images/generations",
        responses=refusals,  # type: ignore[arg-type]
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    async def generate_images(request: Request) -> Response:
        """Draw images."""
        service.refuse_when_draining()
        wanted = parse_request(await _read_body(request, service))
        card = service.find(wanted.model)
        check_against(wanted, card, service.limits)
        drawing = _drawing(wanted, card)
        request.scope[_NOTES] |= {
            "model": card.name,
            "images": drawing.count,
            "steps": drawing.steps,
        }
        events = service.draw(
            card.name,
            drawing,
            deadline_s=wanted.deadline,
            previews=wanted.partial_images or 0,
            progress=wanted.progress,
        )
        if wanted.stream:
            await anext(events)  # Refusals come before the first byte of an answer.
            return _EventStream(_server_sent(events, drawing, card, metrics))
        pictures = await _while_connected(request.receive, _pictures(events, drawing.count))
        data = [{"b64_json": _base64(png)} for png in pictures]
        return JSONResponse({"created": int(time.time()), "data": data} | _facts(drawing, card))


def _drawing(wanted: ImageRequest, card: Card) -> Drawing:
    return Drawing(
        prompt=wanted.prompt,
        count=wanted.n,
        seed=secrets.randbelow(2**31) if wanted.seed is None else wanted.seed,
        steps=wanted.steps or card.steps,
        guidance=guidance_of(wanted, card),
        size=size_of(wanted, card),
        negative_prompt=wanted.negative_prompt,
    )


def _facts(drawing: Drawing, card: Card) -> dict[str, Any]:
    """What an answer says beside the pictures: OpenAI's fields, then ours."""
    height, width = drawing.size or card.image_size
    return {
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": f"{width}x{height}",
        "model": card.name,
        "seed": drawing.seed,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
    }


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
    events: AsyncGenerator[Event], drawing: Drawing, card: Card, metrics: Metrics
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
                facts |= {"b64_json": _base64(event.png), "created_at": int(time.time())}
                facts |= _facts(drawing, card)
                if event.kind == "preview":
                    facts["partial_image_index"] = shown[event.index]
                    shown[event.index] += 1
                    yield _sse("image_generation.partial_image", facts)
                else:
                    yield _sse("image_generation.completed", facts)
    except ApiError as error:
        metrics.error(error.code)
        yield _sse("error", {"type": "error"} | error.envelope)


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n".encode()


async def _read_body(request: Request, service: Drawer) -> bytes:
    """The whole body, of bounded size and in bounded time.

    Raises:
        ApiError: 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body must be application/json, got {kind[:80] or 'no content type'!r}",
        )
    limits = service.limits
    body = bytearray()
    come = 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                come += len(chunk)
                # A client that is still sending does not read: some more is taken and thrown away.
                if come <= limits.body_bytes:
                    body += chunk
                elif come > _DISCARDED * limits.body_bytes:
                    break
    except TimeoutError as err:
        raise ApiError(
            408, "body_timeout", f"the body did not come within {limits.body_s:g} s"
        ) from err
    if come > limits.body_bytes:
        raise ApiError(413, "body_too_large", f"the body may have {limits.body_bytes} bytes")
    return bytes(body)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client hangs up.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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


def _add_models(app: FastAPI, service: Drawer) -> None:
    def described(card: Card) -> dict[str, Any]:
        facts = asdict(card)
        name = facts.pop("name")
        most = min(service.limits.steps, facts.pop("most_steps"))
        limits = {"most_steps": most, "most_images": service.limits.images}
        return {"id": name, "object": "model", "created": 0, "owned_by": "trtq"} | facts | limits

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """What can be drawn with."""
        return {"object": "list", "data": [described(card) for card in service.cards.values()]}

    @app.get("/v1/models/{name}", responses={404: {"description": "There is no such model."}})
    async def show_model(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service.find(name))


def _add_health(app: FastAPI, service: Drawer, metrics: Metrics) -> None:
    stops = {503: {"description": "The server is about to stop."}}

    def readiness() -> JSONResponse:
        ready = not service.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/healthz")
    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @app.get("/readyz", responses=stops)  # type: ignore[arg-type]
    @app.get("/v2/health/ready", responses=stops)  # type: ignore[arg-type]
    async def ready() -> JSONResponse:
        """Whether requests are taken on."""
        return readiness()

    missing = {404: {"description": "There is no such model."}}

    @app.get("/v2/models/{name}/ready", responses=stops | missing)  # type: ignore[arg-type]
    async def model_ready(name: str) -> JSONResponse:
        """Whether requests for a model are taken on."""
        service.find(name)
        return readiness()

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Measurements for Prometheus."""
        return Response(metrics.expose(), media_type=metrics.content_type)


def _add_page(app: FastAPI) -> None:
    page = (files("trtq.serve") / "page.html").read_text(encoding="utf-8")
    # The page holds all it needs; whatever a picture or a message might smuggle in is not run.
    parts = {
        tag: page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in ("script", "style")
    }
    allowed = {
        f"{tag}-src": f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in parts.items()
    }
    policy = {"default-src": "'none'", "img-src": "data:", "connect-src": "'self'"} | allowed
    headers = {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items())
        + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """Try it in a browser."""
        return Response(page, media_type="text/html", headers=headers)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(error: ApiError) -> JSONResponse:
        metrics.error(error.code)
        return JSONResponse(error.envelope, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.scope[_NOTES]["error"] = error.code
        if error.status == 500:
            logger.error("request failed", exc_info=error.__cause__ or error)
        return answer(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        code = _STATUS_CODES.get(error.status_code, "invalid_request")
        found = answer(ApiError(error.status_code, code, str(error.detail)))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "internal_error", "the server failed; its log says more"))


class _Guard:
    """Around every request: its id, the API key, its measurement and its line in the log."""

    def __init__(self, app: Any, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if api_key is None else b"Bearer " + api_key.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = time.monotonic()
        given = dict(scope["headers"])
        request_id = given.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        notes: dict[str, Any] = {}
        scope[_NOTES] = notes
        status = 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            if not self._may(scope["path"], given):
                error = ApiError(
                    401, "invalid_api_key", "give the API key as 'Authorization: Bearer KEY'"
                )
                self._metrics.error(error.code)
                await JSONResponse(error.envelope, 401, error.headers)(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except ClientGoneError:
            status = _GONE
            self._metrics.error("client_gone")
        except Exception:
            # Starlette has answered it; here is where it is told.
            logger.exception("request failed", extra={FIELDS: {"request_id": request_id.decode()}})
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, seconds)
            facts = {
                "request_id": request_id.decode(),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
            }
            level = logging.DEBUG if scope["method"] == "GET" else logging.INFO
            logger.log(level, "request", extra={FIELDS: facts | notes})

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or not path.startswith("/v1"):
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._key)
