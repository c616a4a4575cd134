"""The HTTP protocol of the server, with limits on the size and duration of requests.

Input that the parser cannot read gets a response like any other error: OpenAI's envelope with a request
id. If a client is still sending when its response is complete, the server keeps reading briefly before
it closes the connection: closing it while bytes arrive would reset it and lose the response.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtq.serve.http.errors import ApiError, request_id_of
from trtq.serve.http.refusals import RefusedError, checked_target, explain, refusal_bytes
from trtq.serve.logs import FIELDS

__all__ = ["BoundedProtocol"]

logger = logging.getLogger(__name__)
_HEAD_BYTES = 64 << 10
_HEAD_FIELDS = 256
_HEAD_S = 10.0
_PART = 8 << 10
"""Number of bytes that are parsed at a time; bytes after a request in progress wait unparsed."""
_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20


class _Transport:
    """Wraps the transport that uvicorn uses, to change how a connection is closed."""

    def __init__(self, transport: Any, close: Callable[[], None]) -> None:
        self._transport = transport
        self.write = transport.write
        self.close = close
        self.lingering = False

    def is_closing(self) -> bool:
        """Whether no further response can be sent."""
        return self.lingering or bool(self._transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """Limits the head of a request and the time between requests, and answers malformed input.

    Args:
        refused: callback with the HTTP status and the error code of a response by this class.
    """

    transport: Any

    def __init__(
        self, *arguments: Any, refused: Callable[[int, str], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._refused = refused
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._timer: Any = None
        self._pending = bytearray()
        self._discarded = 0
        self._refusal: ApiError | None = None
        self._active: Any = None
        self._receiving = False
        self._in_head = False
        self._keep_alive = False
        self._fields = self._field_bytes = self._silent_bytes = 0

    # The connection.

    def connection_made(self, transport: Any) -> None:
        """Called when a client has connected."""
        self._raw = transport
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self._close)))
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._pending.clear()
        self.transport.lingering = True
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called when the server stops."""
        self._keep_alive = False
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        """Called when bytes have arrived."""
        self._unset_keepalive_if_required()
        if self.transport.lingering or self._refusal is not None:
            self._discarded += len(data)
            if self.transport.lingering and self._discarded > _LINGER_BYTES:
                self._raw.abort()
            return
        self._pending += data
        self._parse()

    def _parse(self) -> None:
        """Parse the received bytes up to the end of the request in progress."""
        while self._pending and not self.pipeline and not self.transport.is_closing():
            part = bytes(self._pending[:_PART])
            del self._pending[:_PART]
            # The parser reports a field's name or value, and a chunk extension, only at its end.
            self._silent_bytes += len(part)
            try:
                self.parser.feed_data(part)
                self._check_size()
            except httptools.HttpParserUpgrade:
                # The following bytes belong to another protocol, which the server does not support.
                self._keep_alive = self.cycle.keep_alive = False
                self._pending.clear()
                return
            except (httptools.HttpParserError, RefusedError) as err:
                self._refuse(explain(err, part))
                return
        if self._pending:
            self.flow.pause_reading()

    def _check_size(self) -> None:
        if self._fields > _HEAD_FIELDS:
            text = f"a request may have up to {_HEAD_FIELDS} header fields"
            raise RefusedError(ApiError(431, "head_too_large", text))
        if self._field_bytes + self._silent_bytes > _HEAD_BYTES:
            text = f"the request line and the header may have up to {_HEAD_BYTES} bytes"
            raise RefusedError(ApiError(431, "head_too_large", text))

    # Events of the parser.

    def on_message_begin(self) -> None:
        """Called when the first byte of a request has arrived."""
        self._silent_bytes = 0
        self._receiving = self._in_head = True
        self._fields = self._field_bytes = 0
        super().on_message_begin()
        self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        """Called with a part of the request's target."""
        self._silent_bytes = 0
        self._field_bytes += len(url)
        self._check_size()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with a field of the header, or of the trailer, which is ignored."""
        self._silent_bytes = 0
        self._fields += 1
        self._field_bytes += len(name) + len(value) + 4
        self._check_size()
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called at the end of the header."""
        self._silent_bytes = 0
        self._stop_waiting()
        self._check_head()
        super().on_headers_complete()
        self._in_head = False
        # If the response is complete before the request is, the connection is closed.
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_chunk_header(self) -> None:
        """Called when a chunk of the body begins."""
        self._silent_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Called with a part of the body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called when the request is complete."""
        self._silent_bytes = 0
        self._receiving = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def _check_head(self) -> None:
        """Check the head of the request and replace its target with a path.

        Raises:
            RefusedError: the server does not support such a request, or too many connections are open.
        """
        self.url = checked_target(
            self.parser.get_method(),
            self.parser.get_http_version(),
            self.url,
            self.headers,
            upgrade=self.parser.should_upgrade(),
        )
        limit = self._max_connections
        if limit is not None and max(len(self.connections), len(self.tasks)) >= limit:
            text = "too many connections are open; try again"
            raise RefusedError(ApiError(503, "too_many_connections", text, retry_after=1))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Called when a response is complete, after which the next request may begin."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._pending and not self.pipeline:
            self.loop.call_soon(self._parse_on)
        elif self._active.response_complete and self._refusal is not None:
            self._send_refusal()
        elif self._active.response_complete and not self._receiving:
            # uvicorn's timer stops at the first byte, even if that byte does not begin a request.
            self._wait_for_head()

    def _parse_on(self) -> None:
        if not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._parse()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(_HEAD_S, self._no_head)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_head(self) -> None:
        if self._receiving:
            text = f"the request's head did not arrive within {_HEAD_S:g} s"
            self._refuse(ApiError(408, "head_timeout", text))
        else:
            self._raw.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer malformed input after the requests that precede it."""
        self._stop_waiting()
        self._pending.clear()
        self._refusal = error
        if self._receiving and not self._in_head:
            # The input is in the body of a request that the application is already answering.
            if self.pipeline:
                self.pipeline.popleft()
                self.cycle = self._active
            elif self._active.response_started:
                return  # The connection closes after that response.
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
        self._raw.write(refusal_bytes(error, request_id, self.server_state.default_headers))
        fields = {"request_id": request_id.decode(), "status": error.status, "error": error.code}
        logger.info("request", extra={FIELDS: fields})
        if self._refused is not None:
            self._refused(error.status, error.code)
        self._linger()

    def _close(self) -> None:
        """Close the connection, but only after a moment if the client may still be sending."""
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
        self._timer = self.loop.call_later(_LINGER_S, self._raw.abort)
