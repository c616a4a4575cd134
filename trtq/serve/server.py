"""`trtq serve`: opens the models, listens, and stops without dropping accepted requests."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

from trtq._optional import require
from trtq.errors import ArtefactError, TrtqError
from trtq.serve.hosting import build_service, is_compiling
from trtq.serve.logs import FIELDS
from trtq.serve.metrics import Metrics
from trtq.serve.options import ServeOptions
from trtq.serve.requests import ImageGenerator
from trtq.serve.service import Service

__all__ = ["drain", "listen", "serve"]

logger = logging.getLogger(__name__)
_LAST_RESPONSES_S = 2.0
"""Time limit of sending the last responses, and of the engine's last call, in seconds."""
_CONNECTIONS = 1024
_BACKLOG = 2048
_UNREAD_MS = 60_000


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; it does not accept connections yet.

    Args:
        host: address or host name.
        port: port; 0: any free port.

    Raises:
        ArtefactError: the address or the port is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is named; otherwise a response waits 40 ms
    # for an acknowledgement between its head and its body.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The operating system closes the connection of a client that reads nothing for this time.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        bound.bind((host, port))
    except (OSError, OverflowError, TypeError, UnicodeError) as err:
        bound.close()
        raise _cannot_listen(host, port, err) from err
    return bound


def _cannot_listen(host: str, port: int, err: Exception) -> ArtefactError:
    return ArtefactError(
        f"cannot listen at {host[:80]} port {port}: {err}; choose another with --host and --port"
    )


def serve(options: ServeOptions, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: options of the server.
        announce: called with `url`, `models` and `seconds` once the server accepts requests.

    Raises:
        TrtqError: a model or the port is not available, or a batcher died.
    """
    begun = time.monotonic()
    _enable_fault_handler()
    require("fastapi")
    require("uvicorn")
    require("httptools")
    bound = listen(options.host, options.port)
    with bound:
        metrics = Metrics()
        listening = threading.Event()
        service = build_service(options, metrics, listening)
        try:
            # Two servers may be bound to the same port until one of them listens.
            bound.listen(_BACKLOG)
        except OSError as err:
            service.close()
            raise _cannot_listen(options.host, options.port, err) from err

        def ready() -> None:
            # The objects that exist now are permanent, so exclude them from garbage collection.
            gc.freeze()
            host, port = bound.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            seconds = round(time.monotonic() - begun, 3)
            announce({"url": url, "models": list(service.models), "seconds": seconds})
            listening.set()

        try:
            asyncio.run(_run(options, service, metrics, bound, ready))
        finally:
            ended = service.close(_LAST_RESPONSES_S)
    _leave(service, ended=ended)


def _leave(service: Service, *, ended: bool) -> None:
    """End the process if a call of an engine or a compiler still runs.

    Neither can be interrupted, and all accepted requests have been answered by now.

    Args:
        service: the closed service.
        ended: whether the threads of the service ended.

    Raises:
        TrtqError: a batcher died.
    """
    if not ended:
        logger.warning("leaving a call of the engine behind")
    if not ended or is_compiling():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if service.died else 0)
    if service.died:
        raise TrtqError("a batcher died while it served; see its line in the log above")


def _enable_fault_handler() -> None:
    """Print a traceback to standard error if native code crashes."""
    with suppress(OSError, ValueError, AttributeError):  # Standard error may not be a file.
        faulthandler.enable(sys.stderr)


async def _run(
    options: ServeOptions,
    service: Service,
    metrics: Metrics,
    bound: socket.socket,
    ready: Callable[[], None],
) -> None:
    import uvicorn

    from trtq.serve.http.app import create_app
    from trtq.serve.http.protocol import BoundedProtocol

    class Server(uvicorn.Server):
        """A server that leaves signals to `trtq.serve.server` and calls `ready` when it listens."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

    access = options.access
    for text in access.warnings:
        logger.warning(text)

    def refused(status: int, code: str) -> None:
        metrics.error(code)
        metrics.request("other", status, 0.0)

    config = uvicorn.Config(
        create_app(service, metrics, options.api_key, access),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        http=cast(Any, partial(BoundedProtocol, refused=refused)),
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(_LAST_RESPONSES_S),
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def stop() -> None:
        service.draining = True
        # A second signal stops the server at once. Otherwise part of the time is reserved for the last
        # responses and the engine's last call.
        seconds = 0.0 if drains else max(0.0, options.drain_s - 3 * _LAST_RESPONSES_S)
        drains.append(loop.create_task(_drain_and_exit(service, server, seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    await server.serve([bound])


async def _drain_and_exit(service: Service, server: Any, seconds: float) -> None:
    await drain(service, seconds)
    server.should_exit = True


async def drain(generator: ImageGenerator, seconds: float) -> None:
    """Finish accepted requests and answer the rest with 503; new requests get 503 at once.

    Args:
        generator: the generator to drain.
        seconds: maximum time for finishing accepted requests.
    """
    generator.draining = True
    logger.info("draining", extra={FIELDS: {"images_under_way": generator.under_way}})
    await _wait_until_finished(generator, seconds)
    if generator.under_way:
        logger.warning("giving up", extra={FIELDS: {"images_under_way": generator.under_way}})
        generator.give_up()
        await _wait_until_finished(generator, _LAST_RESPONSES_S)


async def _wait_until_finished(generator: ImageGenerator, seconds: float) -> None:
    end = time.monotonic() + seconds
    while generator.under_way and time.monotonic() < end:
        await asyncio.sleep(0.02)
