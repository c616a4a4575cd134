"""What a client is told when a request is not served: OpenAI's envelope, a status, a code."""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = ["ApiError"]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request is refused or given up.

    Args:
        status: of the answer.
        code: stable, for programs.
        message: for people: what came, what is allowed, what to do.
        param: the field of the request that is meant.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> Any:
        """For pickle, which would call with the message alone."""
        make = partial(ApiError, param=self.param, retry_after=self.retry_after)
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
        return headers
