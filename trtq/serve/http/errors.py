"""The errors that clients receive: a status, a code, and OpenAI's envelope."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from functools import partial
from typing import Any

__all__ = ["ApiError", "printable", "request_id_of"]

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """The error of a request that is refused or cancelled.

    Args:
        status: HTTP status of the response.
        code: stable error code, for programs.
        message: error message, for people: what was received, what is allowed, what to do.
        param: name of the invalid field of the request, if there is one.
        retry_after: time after which the client should try again, in seconds.
        allow: allowed methods, for the header `Allow`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    def __reduce__(self) -> Any:
        """Support pickle, which would otherwise pass the message alone."""
        make = partial(ApiError, param=self.param, retry_after=self.retry_after, allow=self.allow)
        return make, (self.status, self.code, self.message)

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the response, as OpenAI's clients expect it."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 408:
            # Otherwise OpenAI's clients would retry twice on a server that is already too slow.
            headers["X-Should-Retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.allow:
            headers["Allow"] = self.allow
        return headers


def printable(value: str) -> str:
    """Escape text from a client for a message: ASCII, shortened."""
    return value[:80].encode("ascii", "backslashreplace").decode()


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The request id in X-Request-ID, or a new id if the header is missing or invalid."""
    given = dict(headers).get(b"x-request-id", b"")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
