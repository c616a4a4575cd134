"""`trtq serve --ray`: runs the application of `trtq.serve.ray.deployment` on Ray until SIGTERM."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from trtq._optional import require
from trtq.documents import shown
from trtq.errors import ArtefactError, UsageError
from trtq.limits import parse_whole
from trtq.serve.logs import FIELDS
from trtq.serve.ray.deployment import app
from trtq.serve.ray.options import RayOptions
from trtq.serve.server import listen

__all__ = ["parse_replicas", "serve_on_ray"]

logger = logging.getLogger(__name__)
_NAME = "trtq"
_POLL_S = 0.1
_CONNECT_S = 10.0
_GRACE_S = 30.0
_MAX_REPLICAS = 1024
_ERROR = re.compile(r"(trtq\.errors|ray\.serve\.exceptions)\.\w+: (.*)")


def parse_replicas(text: str) -> tuple[int, int]:
    """`1:4` -> (1, 4).

    Raises:
        UsageError: the text is malformed or out of range.
    """
    try:
        low, high = (parse_whole(part) for part in text.split(":", 2))
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high <= _MAX_REPLICAS:
        raise UsageError(
            f"the replicas {shown(text)} are not understood; write MIN:MAX, each 1 .. "
            f"{_MAX_REPLICAS}, e.g. 1:4"
        )
    return low, high


def serve_on_ray(options: RayOptions, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    If RAY_ADDRESS is set (`auto`: the Ray instance of this machine), the server joins it, and Ray keeps
    running afterwards. Otherwise the server starts a Ray instance and stops it at the end.

    Args:
        options: options of the server.
        announce: called with `url`, `models`, `seconds`, `replicas` and `logs` (a folder) once the
            server accepts requests.

    Raises:
        TrtqError: a model or the port is not available.
    """
    begun = time.monotonic()
    require("fastapi")
    stdout = sys.stdout
    # Ray prints messages to standard output, which is for the output of `announce` only.
    with redirect_stdout(sys.stderr), _ray() as (logs, joined), _stopping() as stops:
        options = _started(options, joined)
        try:
            ingress = _deployed(options)
            fields = {
                "url": _checked_url(options),
                "models": ingress.model_names.remote().result(),
                "seconds": round(time.monotonic() - begun, 3),
                "replicas": [options.min_replicas, options.max_replicas],
                "logs": logs,
            }
            with redirect_stdout(stdout):
                announce(fields)
            while not stops.wait(1):
                pass
            _drain(ingress, options.drain_s, stops)
        finally:
            # Only the last bytes of responses may be missing, and Ray waits for them.
            serve = require("ray.serve")
            if joined:
                serve.delete(_NAME)
            else:
                serve.shutdown()


class _Stops:
    """Counts the signals that request the server to stop."""

    def __init__(self) -> None:
        self.count = 0
        self._first = threading.Event()
        self.wait = self._first.wait

    def add(self, *_: Any) -> None:
        self.count += 1
        self._first.set()


@contextmanager
def _stopping() -> Iterator[_Stops]:
    stops = _Stops()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stops.add) for number in numbers]
    try:
        yield stops
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _ray() -> Iterator[tuple[str, bool]]:
    """Join or start a Ray instance.

    Yields:
        The folder of Ray's logs, and whether Ray was already running.

    Raises:
        UsageError: RAY_ADDRESS is the address of a proxy to a cluster.
        ArtefactError: no Ray instance listens at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS={address} connects to a cluster from outside; on a machine of the cluster use "
            "RAY_ADDRESS=auto, or 'serve run trtq.serve.ray:app'"
        )
    _check_reachable(address)
    ray, _ = require("ray"), require("ray.serve")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Each line of the log is a JSON object, which messages of Ray are not.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        context = ray.init(
            address or "local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except ConnectionError as err:
        raise ArtefactError(f"there is no Ray at RAY_ADDRESS={address}: {err}") from err
    try:
        yield f"{context.address_info['session_dir']}/logs", bool(address)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise unless the address accepts connections; Ray itself would retry for minutes.

    Raises:
        ArtefactError: the address accepts no connections.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as err:
            raise ArtefactError(f"there is no Ray at RAY_ADDRESS={address}: {err}") from err


def _started(options: RayOptions, joined: bool) -> RayOptions:
    """Start Ray Serve at the address of the options.

    Args:
        options: options of the server.
        joined: whether Ray was already running.

    Returns:
        The options; a port of 0 is replaced with a free port.

    Raises:
        ArtefactError: the port is not available, or an application of this name is already running.
    """
    serve = require("ray.serve")
    running = serve.status() if joined else None
    if running is None or not running.proxies:
        with listen(options.host, options.port) as free:
            options = replace(options, port=free.getsockname()[1])
        serve.start(http_options={"host": options.host, "port": options.port})
    elif _NAME in running.applications:
        raise ArtefactError(
            f"Ray Serve already runs an application {_NAME!r} here; stop it first, or run "
            "'serve run trtq.serve.ray:app --name NAME --route-prefix /NAME path=...'"
        )
    return options


def _deployed(options: RayOptions) -> Any:
    """Run the application and return the handle of its ingress.

    Raises:
        ArtefactError: a replica does not start, or another application uses the route.
    """
    serve = require("ray.serve")
    try:
        return serve.run(app(options), name=_NAME, route_prefix="/")
    except (RuntimeError, require("ray.serve.exceptions").RayServeException) as err:
        status = serve.status().applications.get(_NAME)
        deployments = [] if status is None else status.deployments.values()
        messages = [str(err), *(deployment.message for deployment in deployments)]
        raise ArtefactError(f"the replicas do not start: {_reason(messages)}") from err


def _reason(texts: list[str]) -> str:
    """The last error of trtq in Ray's tracebacks, or else the last line of the first text."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    errors = [match[2] for line in lines if (match := _ERROR.match(line))]
    return errors[-1] if errors else texts[0].strip().rpartition("\n")[2]


def _checked_url(options: RayOptions) -> str:
    """The URL of the server.

    Raises:
        ArtefactError: Ray Serve was already running and listens on another address.
    """
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}"
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=_GRACE_S):
            return url
    except OSError as err:
        raise ArtefactError(
            f"Ray Serve does not answer at {url} ({err}); it was already running and listens "
            "elsewhere: give its --host and --port, or stop it with 'serve shutdown'"
        ) from err


def _drain(ingress: Any, seconds: float, stops: _Stops) -> None:
    """Let the ingress finish its requests; a second signal stops it at once.

    Args:
        ingress: Ray's handle of the ingress.
        seconds: maximum time for finishing accepted requests.
        stops: counter of the signals.
    """
    end = time.monotonic() + seconds + _GRACE_S
    draining = ingress.drain.remote(seconds)
    hurried = False
    while True:
        try:
            draining.result(timeout_s=_POLL_S)
            return
        except TimeoutError:
            if time.monotonic() > end:
                logger.warning(
                    "giving up", extra={FIELDS: {"reason": "the ingress does not respond"}}
                )
                return
        if stops.count > 1 and not hurried:
            hurried = True
            ingress.drain.remote(0.0)
