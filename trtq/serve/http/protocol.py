"""The HTTP parser of the server, with bounds on what a client may send and for how long.

Input that the parser cannot read is answered like everything else: in OpenAI's envelope, with a request
id. If a client is still sending when its answer is complete, the server reads on for a moment before it
closes the connection: closing a connection while bytes arrive resets it, and the answer would be lost.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtq.serve.http.errors import ApiError, printable, request_id_of
from trtq.serve.logs import FIELDS

__all__ = ["BoundedProtocol"]

logger = logging.getLogger(__name__)
_HEAD_BYTES = 64 << 10
_HEAD_FIELDS = 256
_HEAD_S = 10.0
_PART = 8 << 10
"""Bytes that are parsed at a time: what stands behind a request under way waits unparsed."""
_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20
_METHODS = "GET, HEAD, POST"
_METHOD = re.compile(rb"([A-Za-z][A-Za-z-]{0,31}) ")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)


class _RefusedError(Exception):
    """Leaves the parser, which wraps it."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class _Transport:
    """A connection as uvicorn sees it; how it is closed is ours to say."""

    def __init__(self, transport: Any, close: Callable[[], None]) -> None:
        self._transport = transport
        self.write = transport.write
        self.close = close
        self.lingering = False

    def is_closing(self) -> bool:
        """Whether nothing more can be answered."""
        return self.lingering or bool(self._transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """Hangs up on connections whose next request does not begin, or does not end.

    Args:
        refused: called with the status and the code of each answer that no application gave.
    """

    transport: Any

    def __init__(
        self, *arguments: Any, refused: Callable[[int, str], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._refused = refused
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._patience: Any = None
        self._pending = bytearray()
        self._discarded = 0
        self._refusal: ApiError | None = None
        self._active: Any = None
        self._receiving = False
        self._in_head = False
        self._keep_alive = False
        self._fields = 0
        self._field_bytes = 0
        self._silent_bytes = 0

    # The connection.

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        self._raw = transport
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self._close)))
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._pending.clear()
        self.transport.lingering = True
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops."""
        self._keep_alive = False
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        self._unset_keepalive_if_required()
        if self.transport.lingering or self._refusal is not None:
            self._discarded += len(data)
            if self.transport.lingering and self._discarded > _LINGER_BYTES:
                self._raw.abort()
            return
        self._pending += data
        self._parse()

    def _parse(self) -> None:
        """Parse what has come, as far as it is the turn of its request."""
        while self._pending and not self.pipeline and not self.transport.is_closing():
            part = bytes(self._pending[:_PART])
            del self._pending[:_PART]
            # A name, a value or an extension of a chunk is told of at its end.
            self._silent_bytes += len(part)
            try:
                self.parser.feed_data(part)
                self._check_size()
            except httptools.HttpParserUpgrade:
                # To another protocol, which is not spoken here; what follows cannot be understood.
                self._keep_alive = self.cycle.keep_alive = False
                self._pending.clear()
                return
            except (httptools.HttpParserError, _RefusedError) as err:
                self._refuse(_explain(err, part))
                return
        if self._pending:
            self.flow.pause_reading()

    def _check_size(self) -> None:
        if self._fields > _HEAD_FIELDS:
            text = f"a request may have {_HEAD_FIELDS} header fields"
            raise _RefusedError(ApiError(431, "head_too_large", text))
        if self._field_bytes + self._silent_bytes > _HEAD_BYTES:
            text = f"the request line and the header may have {_HEAD_BYTES} bytes"
            raise _RefusedError(ApiError(431, "head_too_large", text))

    # Events of the parser.

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        self._silent_bytes = 0
        self._receiving = self._in_head = True
        self._fields = self._field_bytes = 0
        super().on_message_begin()
        self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        """Some of its target."""
        self._silent_bytes = 0
        self._field_bytes += len(url)
        self._check_size()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of its header; or of its trailer, which nobody reads."""
        self._silent_bytes = 0
        self._fields += 1
        self._field_bytes += len(name) + len(value) + 4
        self._check_size()
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its body begins."""
        self._silent_bytes = 0
        self._stop_waiting()
        self._check_head()
        super().on_headers_complete()
        self._in_head = False
        # If the answer is complete before the request is, the connection is closed.
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_chunk_header(self) -> None:
        """A chunk of its body begins."""
        self._silent_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Some of its body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """It is there."""
        self._silent_bytes = 0
        self._receiving = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def _check_head(self) -> None:
        """Have the target in the one form that is understood further on.

        Raises:
            _RefusedError: it is none.
        """
        method = self.parser.get_method()
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            text = f"the server speaks HTTP/1.1 and HTTP/1.0, not {version}"
            raise _RefusedError(ApiError(400, "invalid_http", text))
        if method == b"CONNECT":
            raise _RefusedError(_no_method("CONNECT"))
        absolute = _ABSOLUTE.fullmatch(self.url)
        if absolute is not None:
            # What it says counts, so it must not say other than the header.
            host = absolute[1]
            if [value.lower() for name, value in self.headers if name == b"host"] != [host.lower()]:
                self.headers.append((b"host", host))
            self.url = absolute[2] if absolute[2][:1] == b"/" else b"/" + absolute[2]
        elif self.url == b"*" and method == b"OPTIONS":
            self.url = b"/"
        if not self.url.startswith(b"/"):
            shown = printable(self.url.decode("latin-1"))
            raise _RefusedError(
                ApiError(400, "invalid_http", f"{shown!r} is no path; begin it with /")
            )
        if self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        ):
            text = "a request that has a body cannot ask for another protocol; leave Upgrade out"
            raise _RefusedError(ApiError(400, "invalid_http", text))
        if self._most is not None and max(len(self.connections), len(self.tasks)) >= self._most:
            text = "too many connections are open; try again"
            raise _RefusedError(ApiError(503, "too_many_connections", text, retry_after=1))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """An answer has been given; the next request may begin."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._pending and not self.pipeline:
            self.loop.call_soon(self._parse_on)
        elif self._active.response_complete and self._refusal is not None:
            self._send_refusal()
        elif self._active.response_complete and not self._receiving:
            # uvicorn's own patience ends with the first byte, also of one that begins no request.
            self._wait_for_head()

    def _parse_on(self) -> None:
        if not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._parse()

    # The end.

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(_HEAD_S, self._no_head)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _no_head(self) -> None:
        if self._receiving:
            text = f"the request's head did not come within {_HEAD_S:g} s"
            self._refuse(ApiError(408, "head_timeout", text))
        else:
            self._raw.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer what was not understood, once what came before it is answered."""
        self._stop_waiting()
        self._pending.clear()
        self._refusal = error
        if self._receiving and not self._in_head:
            # It is in the body of a request that has been taken on, and this is its answer.
            if self.pipeline:
                self.pipeline.popleft()
                self.cycle = self._active
            elif self._active.response_started:
                return  # The connection is closed behind it.
            else:
                self._active.disconnected = True
                self._active.message_event.set()
                self._send_refusal()
        elif self._active is None or self._active.response_complete:
            self._send_refusal()

    def _send_refusal(self) -> None:
        error = self._refusal
        assert error is not None
        if self.transport.is_closing():
            return
        request_id = request_id_of(self.headers or ())
        body = json.dumps(error.envelope).encode()
        phrase = HTTPStatus(error.status).phrase
        lines = {
            **{name.decode(): value.decode() for name, value in self.server_state.default_headers},
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-content-type-options": "nosniff",
            "x-request-id": request_id.decode(),
            **{name.lower(): value for name, value in error.headers.items()},
        }
        head = f"HTTP/1.1 {error.status} {phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._raw.write(head.encode("latin-1") + b"\r\n" + body)
        facts = {"request_id": request_id.decode(), "status": error.status, "error": error.code}
        logger.info("request", extra={FIELDS: facts})
        if self._refused is not None:
            self._refused(error.status, error.code)
        self._linger()

    def _close(self) -> None:
        """Close the connection; if the client may still be sending, not at once."""
        if self.transport.is_closing():
            return
        unread = self._receiving or self._pending or self._refusal is not None
        if unread or self.flow.read_paused:
            self._linger()
        else:
            self._raw.close()

    def _linger(self) -> None:
        self.transport.lingering = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._pending.clear()
        self.flow.resume_reading()
        if self._raw.can_write_eof():
            self._raw.write_eof()
        self._patience = self.loop.call_later(_LINGER_S, self._raw.abort)


def _no_method(method: str) -> ApiError:
    text = f"there is no method {printable(method)!r} here, but {_METHODS}"
    return ApiError(405, "method_not_allowed", text, allow=_METHODS)


def _explain(error: Exception, part: bytes) -> ApiError:
    """What to say of something that cannot be parsed."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, _RefusedError):
            return found.error
        found = found.__context__
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        method = _METHOD.match(part)
        if method is not None:
            return _no_method(method[1].decode())
        if part.startswith(b"\x16\x03"):
            text = "this is TLS; the server speaks plain HTTP: begin the address with http://"
            return ApiError(400, "invalid_http", text)
    if part.startswith(b"PRI * HTTP/2"):
        text = "this is HTTP/2; the server speaks HTTP/1.1"
        return ApiError(400, "invalid_http", text)
    reason = printable(str(error) or "it cannot be read")
    return ApiError(400, "invalid_http", f"the request is no HTTP/1.1: {reason}")
