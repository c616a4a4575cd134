"""Requests that the HTTP parser refuses, and the bytes of the responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from http import HTTPStatus

import httptools

from trtq.serve.http.errors import ApiError, printable

__all__ = ["RefusedError", "checked_target", "explain", "invalid_http", "refusal_bytes"]

_METHODS = "GET, HEAD, POST"
_METHOD = re.compile(rb"([A-Za-z][A-Za-z-]{0,31}) ")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)


class RefusedError(Exception):
    """Carries an `ApiError` through the parser, which wraps exceptions of its callbacks."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def invalid_http(text: str) -> ApiError:
    """The error of a request that is not valid HTTP."""
    return ApiError(400, "invalid_http", text)


def checked_target(
    method: bytes, version: str, url: bytes, headers: list[tuple[bytes, bytes]], *, upgrade: bool
) -> bytes:
    """Check the head of a request and return its target as a path.

    Args:
        method: method of the request.
        version: HTTP version, e.g. `1.1`.
        url: target of the request, a path or an absolute URL.
        headers: header fields with lower-case names; the host is appended if only the target has one.
        upgrade: whether the client requests another protocol.

    Raises:
        RefusedError: the server does not support such a request.
    """
    if version not in ("1.0", "1.1"):
        raise RefusedError(invalid_http(f"the server speaks HTTP/1.1 and HTTP/1.0, not {version}"))
    if method == b"CONNECT":
        raise RefusedError(_no_method("CONNECT"))
    absolute = _ABSOLUTE.fullmatch(url)
    if absolute is not None:
        # The host of an absolute URL takes precedence, so it must not differ from the header.
        host = absolute[1]
        if [value.lower() for name, value in headers if name == b"host"] != [host.lower()]:
            headers.append((b"host", host))
        url = absolute[2] if absolute[2][:1] == b"/" else b"/" + absolute[2]
    elif url == b"*" and method == b"OPTIONS":
        url = b"/"
    if not url.startswith(b"/"):
        shown = printable(url.decode("latin-1"))
        raise RefusedError(invalid_http(f"{shown!r} is not a path; begin it with /"))
    if upgrade and any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    ):
        text = "a request with a body cannot ask for another protocol; leave Upgrade out"
        raise RefusedError(invalid_http(text))
    return url


def _no_method(method: str) -> ApiError:
    text = f"there is no method {printable(method)!r} here, but {_METHODS}"
    return ApiError(405, "method_not_allowed", text, allow=_METHODS)


def explain(error: Exception, part: bytes) -> ApiError:
    """The error to send for bytes that cannot be parsed.

    Args:
        error: the exception of the parser.
        part: the bytes passed to the parser.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RefusedError):
            return cause.error
        cause = cause.__context__
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        method = _METHOD.match(part)
        if method is not None:
            return _no_method(method[1].decode())
        if part.startswith(b"\x16\x03"):
            return invalid_http(
                "this is TLS; the server speaks plain HTTP: begin the address with http://"
            )
    if part.startswith(b"PRI * HTTP/2"):
        return invalid_http("this is HTTP/2; the server speaks HTTP/1.1")
    reason = printable(str(error) or "it cannot be parsed")
    return invalid_http(f"the request is not valid HTTP/1.1: {reason}")


def refusal_bytes(
    error: ApiError, request_id: bytes, default_headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """The complete response for an error, after which the connection is closed.

    Args:
        error: the error to send.
        request_id: id of the request.
        default_headers: headers that the server adds to every response.
    """
    body = json.dumps(error.envelope).encode()
    headers = {
        **{name.decode(): value.decode() for name, value in default_headers},
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-content-type-options": "nosniff",
        "x-request-id": request_id.decode(),
        **{name.lower(): value for name, value in error.headers.items()},
    }
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode("latin-1") + b"\r\n" + body
