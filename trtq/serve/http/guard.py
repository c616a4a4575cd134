"""The outermost layer of the HTTP application: access control, API key, metrics and the log."""

from __future__ import annotations

import hmac
import logging
import time
from typing import Any

from starlette.responses import Response

from trtq.serve.http.access import Access
from trtq.serve.http.edits import EDITS_PATH
from trtq.serve.http.errors import ApiError, request_id_of
from trtq.serve.http.images import NOTES, ClientGoneError, Images, Message, Receive, Send, refusal
from trtq.serve.logs import FIELDS
from trtq.serve.metrics import Metrics

__all__ = ["IMAGES_PATH", "Guard", "internal_error"]

logger = logging.getLogger(__name__)
IMAGES_PATH = "/v1/images/generations"
_CLIENT_GONE = 499
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    # Pages of other sites must not show or run a response as an image, a frame or a script.
    (b"cross-origin-resource-policy", b"same-origin"),
]


def internal_error() -> ApiError:
    """The error of a request during which the server failed."""
    return ApiError(500, "internal_error", "the server failed; see its log")


class Guard:
    """Wraps the application: request id, access control, API key, metrics and the log line of a request.

    Requests for images bypass FastAPI's layers, which would double the overhead per image; FastAPI only
    describes these requests in the schema. HEAD is GET without the body, for every path.

    Args:
        app: ASGI application for all other requests.
        images: handler of image requests.
        metrics: metrics of the server.
        api_key: key that requests to `/v1` must send; None: no key.
        access: hosts and origins that the server answers to.
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
        """Answer a request, as ASGI defines it."""
        if scope["type"] != "http":
            return
        begun = time.monotonic()
        request_id = request_id_of(scope["headers"])
        headers = [*_SECURITY_HEADERS, *self._access.cors(scope), (b"x-request-id", request_id)]
        notes: dict[str, Any] = {}
        head = scope["method"] == "HEAD"
        inner = scope | {NOTES: notes, "method": "GET" if head else scope["method"]}
        status: int | None = None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *headers]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._answer(inner, receive, send_on)
        except ClientGoneError:
            status = _CLIENT_GONE
            self._metrics.error("client_gone")
        except ApiError as error:
            notes["error"] = error.code
            await refusal(error, self._metrics)(scope, receive, send_on)
        except Exception:
            logger.exception("request failed", extra={FIELDS: {"request_id": request_id.decode()}})
            if status is None:
                await refusal(internal_error(), self._metrics)(scope, receive, send_on)
        finally:
            seconds = time.monotonic() - begun
            route = scope["path"] if _asks_for_images(scope) else _route(inner)
            self._metrics.request(route, status or 500, seconds)
            fields = {
                "request_id": request_id.decode(),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
            }
            # Probes arrive every few seconds; only failed probes are logged.
            quiet = scope["method"] in ("GET", "HEAD") and (status or 500) < 400
            level = logging.DEBUG if quiet else logging.INFO
            logger.log(level, "request", extra={FIELDS: fields | notes})

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        self._access.check(scope)
        preflight = self._access.preflight(scope)
        if preflight is not None:  # Browsers send a preflight without the key.
            response = Response(status_code=204)
            response.raw_headers = preflight
            await response(scope, receive, send)
            return
        self._check_key(scope)
        if _asks_for_images(scope):
            await (await self._images.answer(scope, receive))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_key(self, scope: Any) -> None:
        if self._key is None or not scope["path"].startswith("/v1"):
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._key):
            text = "send the API key as 'Authorization: Bearer KEY'"
            raise ApiError(401, "invalid_api_key", text)


def _asks_for_images(scope: Any) -> bool:
    return scope["path"] in (IMAGES_PATH, EDITS_PATH) and scope["method"] == "POST"


def _route(scope: Any) -> str:
    """The path of the request's route: a request's path would let clients create labels."""
    return getattr(scope.get("route"), "path", "other")
