"""The HTTP face: OpenAI's images, KServe's health, Prometheus' metrics and the page to try it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import time
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import trtq
from trtq.serve.http.access import Access
from trtq.serve.http.errors import ApiError, request_id_of
from trtq.serve.http.images import NOTES, ClientGoneError, Images, Message, Receive, Send, refusal
from trtq.serve.http.schema import ImageRequest
from trtq.serve.logs import FIELDS
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import ModelInfo
from trtq.serve.service import ImageGenerator

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_GONE = 499
_IMAGES_PATH = "/v1/images/generations"
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}
_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    # No other site's page may show or run an answer as an image, a frame or a script of its own.
    (b"cross-origin-resource-policy", b"same-origin"),
]
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


def create_app(
    service: ImageGenerator,
    metrics: Metrics,
    api_key: str | None = None,
    access: Access | None = None,
) -> Any:
    """The ASGI application.

    Args:
        service: draws.
        metrics: what `/metrics` shows.
        api_key: what requests to `/v1` have to bring; None: nothing.
        access: the hosts and origins that are answered to; None: those of a server on the loopback.
    """
    app = FastAPI(
        title="trtq",
        version=trtq.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    images = Images(service, metrics)
    _add_images(app, images)
    _add_models(app, service)
    _add_health(app, service, metrics)
    _add_page(app)
    _add_error_handlers(app, metrics)
    return _Guard(app, images, metrics, api_key, access or Access())


def _add_images(app: FastAPI, images: Images) -> None:
    schema = ImageRequest.model_json_schema()
    refusals = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for status, text in {
            400: "The request is not understood; `param` names the field.",
            401: "The API key is missing or wrong.",
            403: "The request comes from a page of another site.",
            404: "There is no such model.",
            408: "The body or the images took too long.",
            413: "The body is too large.",
            415: "The body is no JSON.",
            421: "The server does not answer to this host.",
            429: "Too many images are under way; see Retry-After.",
            503: "The server is about to stop.",
        }.items()
    }

    @app.post(
        _IMAGES_PATH,
        responses=refusals,  # type: ignore[arg-type]
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    async def generate_images(request: Request) -> Response:
        """Draw images."""
        return await images.answer(request.scope, request.receive)


def _add_models(app: FastAPI, service: ImageGenerator) -> None:
    def described(info: ModelInfo) -> dict[str, Any]:
        facts = asdict(info)
        name = facts.pop("name")
        facts["max_images"] = service.limits.max_images
        # Former names of both, for one release.
        facts |= {"most_steps": info.max_steps, "most_images": service.limits.max_images}
        return {"id": name, "object": "model", "created": 0, "owned_by": "trtq"} | facts

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """What can be drawn with."""
        return {"object": "list", "data": [described(info) for info in service.infos.values()]}

    @app.get("/v1/models/{name}", responses={404: {"description": "There is no such model."}})
    async def show_model(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service.find(name))


def _add_health(app: FastAPI, service: ImageGenerator, metrics: Metrics) -> None:
    stops = {503: {"description": "The server is about to stop, or cannot draw."}}

    def readiness() -> JSONResponse:
        ready = service.alive and not service.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    fails = {503: {"description": "The server cannot draw any more; start it again."}}

    @app.get("/healthz", responses=fails)  # type: ignore[arg-type]
    @app.get("/v2/health/live", responses=fails)  # type: ignore[arg-type]
    async def live() -> JSONResponse:
        """Whether the process answers, and its batchers run."""
        return JSONResponse({"live": service.alive}, 200 if service.alive else 503)

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
    page = (files("trtq.serve.http") / "page.html").read_text(encoding="utf-8")
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
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """Try it in a browser."""
        return Response(page, media_type="text/html", headers=headers)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.scope[NOTES]["error"] = error.code
        return refusal(error, metrics)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        code = _STATUS_CODES.get(error.status_code, "invalid_request")
        found = refusal(ApiError(error.status_code, code, str(error.detail)), metrics)
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] = "GET, HEAD"  # See `_Guard`.
        found.headers.update(headers)
        return found

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return refusal(_internal_error(), metrics)


def _internal_error() -> ApiError:
    return ApiError(500, "internal_error", "the server failed; its log says more")


class _Guard:
    """Around every request: its id, who asks, the API key, its measurement and its line in the log.

    Requests for images go past FastAPI's layers, which take as long as all else that is done for one
    before it is drawn; FastAPI describes them in the schema. HEAD is GET without the body, everywhere.
    """

    def __init__(
        self, app: Any, images: Images, metrics: Metrics, api_key: str | None, access: Access
    ) -> None:
        self._app = app
        self._images = images
        self._metrics = metrics
        self._key = None if api_key is None else api_key.encode()
        self._access = access

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = time.monotonic()
        request_id = request_id_of(scope["headers"])
        own = [*_ALWAYS, *self._access.cors(scope), (b"x-request-id", request_id)]
        notes: dict[str, Any] = {}
        head = scope["method"] == "HEAD"
        inner = scope | {NOTES: notes, "method": "GET" if head else scope["method"]}
        status: int | None = None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *own]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._answer(inner, receive, send_on)
        except ClientGoneError:
            status = _GONE
            self._metrics.error("client_gone")
        except ApiError as error:
            notes["error"] = error.code
            await refusal(error, self._metrics)(scope, receive, send_on)
        except Exception:
            logger.exception("request failed", extra={FIELDS: {"request_id": request_id.decode()}})
            if status is None:
                await refusal(_internal_error(), self._metrics)(scope, receive, send_on)
        finally:
            seconds = time.monotonic() - begun
            route = _IMAGES_PATH if _asks_for_images(scope) else _route(inner)
            self._metrics.request(route, status or 500, seconds)
            facts = {
                "request_id": request_id.decode(),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
            }
            # Probes come every few seconds; only those that fail are worth a line.
            quiet = scope["method"] in ("GET", "HEAD") and (status or 500) < 400
            level = logging.DEBUG if quiet else logging.INFO
            logger.log(level, "request", extra={FIELDS: facts | notes})

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        self._access.check(scope)
        preflight = self._access.preflight(scope)
        if preflight is not None:  # A browser asks it without the key.
            answer = Response(status_code=204)
            answer.raw_headers = preflight
            await answer(scope, receive, send)
            return
        self._check_key(scope)
        if _asks_for_images(scope):
            await (await self._images.answer(scope, receive))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_key(self, scope: Any) -> None:
        if self._key is None or not scope["path"].startswith("/v1"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._key):
            text = "give the API key as 'Authorization: Bearer KEY'"
            raise ApiError(401, "invalid_api_key", text)


def _asks_for_images(scope: Any) -> bool:
    return bool(scope["path"] == _IMAGES_PATH and scope["method"] == "POST")


def _route(scope: Any) -> str:
    """The route that was taken; not the path, of which clients may make up as many as they like."""
    return getattr(scope.get("route"), "path", "other")
