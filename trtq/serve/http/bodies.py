"""Bodies of requests, and clients that close the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from trtq.serve.http.errors import ApiError

__all__ = [
    "ClientGoneError",
    "Message",
    "Receive",
    "Send",
    "content_type",
    "read_body",
    "while_connected",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

_DISCARDED = 16
"""Factor by which a body may exceed its limit before the server stops reading and discarding it."""
_MAX_DISCARDED = 32 << 20
"""Maximum size of what is discarded of a body, in bytes."""


class ClientGoneError(Exception):
    """The client closed the connection before the response."""


def content_type(scope: Mapping[str, Any]) -> str:
    """The header `Content-Type` of a request; empty if there is none."""
    value: bytes = dict(scope["headers"]).get(b"content-type", b"")
    return value.decode("latin-1")


async def read_body(
    scope: Mapping[str, Any], receive: Receive, expected: str, max_bytes: int, seconds: float
) -> bytes:
    """Read the body of a request, of limited size and in limited time.

    Args:
        scope: ASGI scope of the request.
        receive: ASGI function that returns the parts of the body.
        expected: media type of the body.
        max_bytes: maximum size, in bytes.
        seconds: maximum time, in seconds.

    Raises:
        ApiError: 408 the body takes too long; 413 it is too large; 415 it is of another media type.
        ClientGoneError: the client closed the connection.
    """
    media_type = content_type(scope).partition(";")[0].strip().lower()
    if media_type != expected:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body must be {expected}, got {media_type[:80] or 'no content type'!r}",
        )
    body = bytearray()
    size = 0
    discarded = min(_DISCARDED * max_bytes, max_bytes + _MAX_DISCARDED)
    more = True
    try:
        async with asyncio.timeout(seconds):
            # A client does not read the response while it sends: read and discard part of a large body.
            while more and size <= discarded:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                if size <= max_bytes:
                    body += chunk
                more = message.get("more_body", False)
    except TimeoutError as err:
        raise ApiError(
            408, "body_timeout", f"the body did not arrive within {seconds:g} s"
        ) from err
    if size > max_bytes:
        text = f"the body may have up to {max_bytes} bytes"
        raise ApiError(413, "body_too_large", text)
    return bytes(body)


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work` and return its result; cancel it if the client closes the connection.

    Raises:
        ClientGoneError: the client closed the connection.
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
