"""`trtq serve`: opens the models, listens, and stops without dropping what it took on."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from trtq._optional import require
from trtq.artefact.opened import OnnxFolder, Opened, open_artefact
from trtq.documents import read_text
from trtq.engine.openvino import MAX_SHAPES
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import ArtefactError, TrtqError, UsageError
from trtq.serve.batcher import Batching, batch_sizes
from trtq.serve.http.access import Access
from trtq.serve.logs import FIELDS
from trtq.serve.memory import mapped_files, own_mapped_files
from trtq.serve.metrics import Metrics
from trtq.serve.service import ImageGenerator, Limits, ServedModel, Service

if TYPE_CHECKING:
    from trtq.serve.models.base import ImageModel

__all__ = [
    "ServeOptions",
    "build_service",
    "drain",
    "listen",
    "open_model",
    "parse_batching",
    "read_api_key",
    "serve",
]

logger = logging.getLogger(__name__)
_API_KEY_VARIABLE = "TRTQ_API_KEY"
_MAX_KEY_BYTES = 4096
_LAST_ANSWERS_S = 2.0
"""For answers of what is given up to be sent, and again for the engine's last call to return."""
_COMPILES = "compile-"
_LISTENING_S = 10.0
"""After opening the models, the most that is waited until the server listens."""
_CONNECTIONS = 1024
_BACKLOG = 2048
_READ_NOTHING_MS = 60_000
_LONGEST_NAME = 100
TORCH = "torch"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `trtq serve` is asked for.

    Attributes:
        path: an ONNX folder, a run or a checkpoint.
        name: what requests call it; by default the folder's name.
        beside: a second one, e.g. the float model, to compare with.
        host: address to listen at.
        port: port to listen at; 0: any that is free.
        provider: what runs ONNX folders.
        threads: threads of one operator; None: as many as there are cores.
        batching: see `Batcher`.
        limits: what to take on.
        drain_s: after SIGTERM, how long to finish what was taken on, up to the exit.
        api_key: what requests to `/v1` have to bring.
        allowed_hosts: names that requests may call the server by, see `Access`.
        allowed_origins: origins of pages that may use the server from elsewhere, see `Access`.
    """

    path: str
    name: str | None = None
    beside: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    provider: str | None = None
    threads: int | None = None
    batching: Batching = "step"
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    @property
    def access(self) -> Access:
        """Who may ask."""
        return Access(bound=self.host, hosts=self.allowed_hosts, origins=self.allowed_origins)


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, or in the environment, or None.

    Raises:
        UsageError: the file cannot be read, or a key is empty or holds characters no header can.
    """
    if path is not None:
        key = read_text(path, "the API key", error=UsageError, max_bytes=_MAX_KEY_BYTES).strip()
    elif _API_KEY_VARIABLE in os.environ:
        key = os.environ[_API_KEY_VARIABLE].strip()
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = _API_KEY_VARIABLE if path is None else path
        raise UsageError(
            f"the API key in {where} must be printable ASCII without spaces, and not empty"
        )
    return key


def parse_batching(text: str) -> Batching:
    """The way of batching of this name.

    Raises:
        UsageError: there is none.
    """
    if text not in get_args(Batching):
        raise UsageError(
            f"unknown batching {text!r}; choose one of {', '.join(get_args(Batching))}"
        )
    return cast(Batching, text)


def open_model(
    path: str | Path | Opened,
    name: str,
    *,
    provider: str | None = None,
    threads: int | None = None,
    shapes: int = MAX_SHAPES,
) -> ImageModel:
    """Open what is to be served: without torch and diffusers where that can be.

    Args:
        path: an ONNX folder, a run or a checkpoint.
        name: what requests call it.
        provider: what runs it.
        threads: threads of one operator.
        shapes: batch sizes that may be in use at once.

    Raises:
        TrtqError: as `trtq.pipelines.open.open_any`.
    """
    from trtq.serve.models.torch_free import TorchFreeModel

    # Files are verified once, by what loads them: hashing takes seconds for each gigabyte.
    opened = open_artefact(path, verify=False)
    plain = provider not in (TORCH, *BACKENDS)
    if plain and isinstance(opened, OnnxFolder) and TorchFreeModel.serves(opened):
        return TorchFreeModel(
            opened.verified(), name, provider=provider or "cpu", threads=threads, shapes=shapes
        )
    from trtq.pipelines.open import open_any
    from trtq.serve.models.pipeline import PipelineModel

    source = open_any(opened, provider, threads)
    engine = getattr(source.denoiser, "engine", None)
    running = TORCH if engine is None else engine.provider
    return PipelineModel(source, name, running, shapes, opened)


def build_service(
    options: ServeOptions, metrics: Metrics, ready: threading.Event | None = None
) -> Service:
    """Open all models and make each ready for its smallest batch; further sizes follow meanwhile.

    Args:
        options: what is asked for.
        metrics: where the models count.
        ready: set when the server listens; what can wait is compiled from then on. None: at once.

    Raises:
        TrtqError: one cannot be opened or run.
    """
    paths = {_name_of(options.path) if options.name is None else options.name: options.path}
    if options.beside is not None:
        name = _name_of(options.beside)
        if name in paths:
            raise UsageError(f"both models are called {name!r}; call the first another with --name")
        paths[name] = options.beside
    for name in paths:
        if not name.isprintable() or "/" in name or not 0 < len(name) <= _LONGEST_NAME:
            raise UsageError(f"a model cannot be called {name!r}; choose another with --name")
    hosted: dict[str, ServedModel] = {}
    for name, path in paths.items():
        first = not hosted
        hosted[name] = _host(path, name, options, metrics, ready, provided=first)
    return Service(hosted, options.limits)


def _name_of(path: str) -> str:
    """What a model is called unless the user says: its folder's name, also of `.`."""
    return Path(os.path.realpath(path)).name


def _host(
    path: str,
    name: str,
    options: ServeOptions,
    metrics: Metrics,
    ready: threading.Event | None,
    *,
    provided: bool,
) -> ServedModel:
    begun = time.monotonic()
    limits = options.limits
    sizes = limits.batch_sizes or batch_sizes(limits.batch)
    opened = open_artefact(path, verify=False)
    provider = options.provider if provided or isinstance(opened, OnnxFolder) else None
    mapped = mapped_files()
    model = open_model(opened, name, provider=provider, threads=options.threads, shapes=len(sizes))
    if model.max_rows is not None and model.max_rows < limits.batch:
        raise UsageError(
            f"{path} takes up to {model.max_rows} rows in a call, fewer than {limits.batch}; give "
            f"--max-batch {max(model.max_rows, 2)}, or build it for more: trtq build --batch"
        )
    # An image with guidance takes two rows, so what a request gets by default has to fit.
    least = 2 if model.info.guidance != 1 else 1
    first = next(size for size in sizes if size >= least)
    try:
        model.warm(first)
    except TrtqError:
        raise
    except Exception as err:  # An engine's own exceptions share no base but Exception.
        raise ArtefactError(f"{path} was opened and cannot be run: {err}") from err
    own_mapped_files(mapped)
    compiled = sizes if limits.batch_sizes else None
    rest = [size for size in sizes if size != first]
    hosted = ServedModel(
        model,
        limits,
        options.batching,
        metrics,
        sizes=[first] if model.fixed_shapes else compiled,
        more_sizes=model.fixed_shapes and bool(rest),
        load_seconds=time.monotonic() - begun,
    )
    if model.fixed_shapes and rest:
        threading.Thread(
            target=_compile_rest,
            args=(hosted, rest, ready, mapped),
            name=f"{_COMPILES}{name}",
            daemon=True,
        ).start()
    return hosted


def _compiling() -> bool:
    """Whether a size is being compiled; the process cannot end in order meanwhile."""
    return any(thread.name.startswith(_COMPILES) for thread in threading.enumerate())


def _compile_rest(
    hosted: ServedModel,
    sizes: Sequence[int],
    ready: threading.Event | None,
    mapped: set[str],
) -> None:
    if ready is not None:
        # Compiling takes all the cores; a server that never listens is of no use to anybody.
        ready.wait(_LISTENING_S)
    try:
        for size in sizes:
            hosted.model.warm(size)
            own_mapped_files(mapped)
            hosted.batcher.add_size(size)
    except Exception:  # The sizes before it still serve.
        logger.exception("cannot compile", extra={FIELDS: {"batch": size}})
    else:
        facts = {"model": hosted.info.name, "batch_sizes": sizes}
        logger.info("compiled", extra={FIELDS: facts})
    finally:
        hosted.batcher.no_more_sizes()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which nobody can connect to yet.

    Raises:
        ArtefactError: the address or the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once only where the protocol is named; otherwise an answer waits 40 ms for an
    # acknowledgement between its head and its body.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Clients that take nothing of an answer for so long are hung up on, by the system.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _READ_NOTHING_MS)
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
        options: see there.
        announce: called with `url`, `models` and `seconds` when requests are taken on.

    Raises:
        TrtqError: the models or the port cannot be had, or a batcher died.
    """
    begun = time.monotonic()
    _tell_of_crashes()
    require("fastapi")
    require("uvicorn")
    require("httptools")
    bound = listen(options.host, options.port)
    with bound:
        metrics = Metrics()
        listening = threading.Event()
        service = build_service(options, metrics, listening)
        try:
            # Two servers may be bound to a port as long as none listens.
            bound.listen(_BACKLOG)
        except OSError as err:
            service.close()
            raise _cannot_listen(options.host, options.port, err) from err

        def ready() -> None:
            # What is there now stays: the collector of garbage need not look through it again and again.
            gc.freeze()
            host, port = bound.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            seconds = round(time.monotonic() - begun, 3)
            announce({"url": url, "models": list(service.hosted), "seconds": seconds})
            listening.set()

        try:
            asyncio.run(_run(options, service, metrics, bound, ready))
        finally:
            ended = service.close(_LAST_ANSWERS_S)
    if not ended:
        logger.warning("leaving a call of the engine behind")
    if not ended or _compiling():
        # Neither can be interrupted, and all that was taken on has been answered.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if service.died else 0)
    if service.died:
        raise TrtqError("a batcher died while it served; its line in the log above says why")


def _tell_of_crashes() -> None:
    """Have a crash of the runtime's own code leave its place on standard error."""
    with suppress(OSError, ValueError, AttributeError):  # Standard error need not be a file.
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
        """Leaves signals to us, and says when it listens."""

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
        timeout_graceful_shutdown=int(_LAST_ANSWERS_S),
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def stop() -> None:
        service.draining = True
        # Asked a second time: now.
        # Answers and the engine's last call need some of the time.
        seconds = 0.0 if drains else max(0.0, options.drain_s - 3 * _LAST_ANSWERS_S)
        drains.append(loop.create_task(_drain(service, server, seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    await server.serve([bound])


async def _drain(service: Service, server: Any, seconds: float) -> None:
    await drain(service, seconds)
    server.should_exit = True


async def drain(service: ImageGenerator, seconds: float) -> None:
    """Finish what was taken on; answer the rest with 503. New requests get that at once."""
    service.draining = True
    logger.info("draining", extra={FIELDS: {"images_under_way": service.under_way}})
    await _until_idle(service, seconds)
    if service.under_way:
        logger.warning("giving up", extra={FIELDS: {"images_under_way": service.under_way}})
        service.give_up()
        await _until_idle(service, _LAST_ANSWERS_S)


async def _until_idle(service: ImageGenerator, seconds: float) -> None:
    end = time.monotonic() + seconds
    while service.under_way and time.monotonic() < end:
        await asyncio.sleep(0.02)
