"""What a client is told when a request is not served: OpenAI's envelope, a status, a code."""

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
    """A request is refused or given up.

    Args:
        status: of the answer.
        code: stable, for programs.
        message: for people: what came, what is allowed, what to do.
        param: the field of the request that is meant.
        retry_after: seconds after which it is worth another try.
        allow: the methods that there are.
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
        """For pickle, which would call with the message alone."""
        make = partial(ApiError, param=self.param, retry_after=self.retry_after, allow=self.allow)
        return make, (self.status, self.code, self.message)

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI's clients read it."""
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
        """Headers that belong to the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 408:
            # OpenAI's clients would ask again, twice, a server that is too slow already.
            headers["X-Should-Retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.allow:
            headers["Allow"] = self.allow
        return headers


def printable(value: str) -> str:
    """What a client sent, as a message may show it: ASCII, and not too much of it."""
    return value[:80].encode("ascii", "backslashreplace").decode()


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The id that a request brings in X-Request-ID, or a new one where that is none."""
    given = dict(headers).get(b"x-request-id", b"")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
