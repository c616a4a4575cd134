"""The HTTP application: OpenAI's images, KServe's health, Prometheus' metrics and a page to try it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import trtq
from trtq.serve.http.access import Access
from trtq.serve.http.edits import EDITS_PATH, edit_schema
from trtq.serve.http.errors import ApiError
from trtq.serve.http.guard import IMAGES_PATH, Guard, internal_error
from trtq.serve.http.images import NOTES, Images, refusal
from trtq.serve.http.multipart import FORM_TYPE
from trtq.serve.http.schema import ImageRequest
from trtq.serve.metrics import Metrics
from trtq.serve.models.base import ModelInfo
from trtq.serve.requests import ImageGenerator

__all__ = ["create_app"]

_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}
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
    generator: ImageGenerator,
    metrics: Metrics,
    api_key: str | None = None,
    access: Access | None = None,
) -> Any:
    """Create the ASGI application.

    Args:
        generator: the image generator.
        metrics: metrics of the server.
        api_key: key that requests to `/v1` must send; None: no key.
        access: hosts and origins that the server answers to; None: those of the loopback interface.
    """
    app = FastAPI(
        title="trtq",
        version=trtq.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    images = Images(generator, metrics)
    _add_images(app, images)
    _add_models(app, generator)
    _add_health(app, generator, metrics)
    _add_page(app)
    _add_error_handlers(app, metrics)
    return Guard(app, images, metrics, api_key, access or Access())


def _add_images(app: FastAPI, images: Images) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for status, text in {
            400: "The request is invalid; `param` names the field.",
            401: "The API key is missing or wrong.",
            403: "The request is from a page of another site.",
            404: "There is no such model.",
            408: "The body or the images took too long.",
            413: "The body is too large.",
            415: "The body is of another media type.",
            421: "The server does not answer to this host.",
            429: "Too many images are in progress; see Retry-After.",
            503: "The server is about to stop.",
        }.items()
    }

    def takes(media_type: str, schema: dict[str, object]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}

    @app.post(
        IMAGES_PATH,
        responses=refusals,
        openapi_extra=takes("application/json", ImageRequest.model_json_schema()),
    )
    async def generate_images(request: Request) -> Response:
        """Draw images."""
        return await images.answer(request.scope, request.receive)

    @app.post(EDITS_PATH, responses=refusals, openapi_extra=takes(FORM_TYPE, edit_schema()))
    async def edit_images(request: Request) -> Response:
        """Draw images from images."""
        return await images.answer(request.scope, request.receive)


def _add_models(app: FastAPI, generator: ImageGenerator) -> None:
    def described(info: ModelInfo) -> dict[str, Any]:
        fields = asdict(info)
        name = fields.pop("name")
        fields["max_images"] = generator.limits.max_images
        # The former names of three keys stay for one release.
        fields |= {"most_steps": info.max_steps, "most_images": generator.limits.max_images}
        if info.sizes is not None:
            fields["sizes"]["step"] = info.sizes.multiple_of
        return {"id": name, "object": "model", "created": 0, "owned_by": "trtq"} | fields

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models."""
        data = [described(info) for info in generator.models.values()]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name}", responses={404: {"description": "There is no such model."}})
    async def show_model(name: str) -> dict[str, Any]:
        """Describe a model."""
        return described(generator.find(name))


def _add_health(app: FastAPI, generator: ImageGenerator, metrics: Metrics) -> None:
    stops = {503: {"description": "The server is about to stop, or cannot draw."}}

    def readiness() -> JSONResponse:
        ready = generator.alive and not generator.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    fails = {503: {"description": "The server can no longer generate images; restart it."}}

    @app.get("/healthz", responses=fails)  # type: ignore[arg-type]
    @app.get("/v2/health/live", responses=fails)  # type: ignore[arg-type]
    async def live() -> JSONResponse:
        """Whether the process responds and its batchers run."""
        return JSONResponse({"live": generator.alive}, 200 if generator.alive else 503)

    @app.get("/readyz", responses=stops)  # type: ignore[arg-type]
    @app.get("/v2/health/ready", responses=stops)  # type: ignore[arg-type]
    async def ready() -> JSONResponse:
        """Whether the server accepts requests."""
        return readiness()

    missing = {404: {"description": "There is no such model."}}

    @app.get("/v2/models/{name}/ready", responses=stops | missing)  # type: ignore[arg-type]
    async def model_ready(name: str) -> JSONResponse:
        """Whether the server accepts requests for a model."""
        generator.find(name)
        return readiness()

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.expose(), media_type=metrics.content_type)


def _add_page(app: FastAPI) -> None:
    page = (files("trtq.serve.http") / "page.html").read_text(encoding="utf-8")
    # The page loads nothing else, so its policy allows only its own script and style.
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
        """The page to try the server in a browser."""
        return Response(page, media_type="text/html", headers=headers)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.scope[NOTES]["error"] = error.code
        return refusal(error, metrics)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        code = _STATUS_CODES.get(error.status_code, "invalid_request")
        response = refusal(ApiError(error.status_code, code, str(error.detail)), metrics)
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] = "GET, HEAD"  # See `Guard`.
        response.headers.update(headers)
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return refusal(internal_error(), metrics)
