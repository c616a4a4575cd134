"""`trtq serve --ray`: the application of `trtq.serve.ray.deployment` on a local Ray, until SIGTERM."""

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
from trtq.serve.ray.deployment import RayOptions, app
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
        UsageError: not of that form.
    """
    try:
        least, most = (parse_whole(part) for part in text.split(":", 2))
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most <= _MAX_REPLICAS:
        raise UsageError(
            f"the replicas {shown(text)} are not understood; write MIN:MAX, each 1 .. "
            f"{_MAX_REPLICAS}, e.g. 1:4"
        )
    return least, most


def serve_on_ray(options: RayOptions, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    The Ray at RAY_ADDRESS (`auto`: the one that runs on this machine) is joined and keeps running.
    Without that variable one is started.

    Args:
        options: see there.
        announce: called with `url`, `models`, `seconds`, `replicas` and `logs` (a folder) when requests
            are taken on.

    Raises:
        TrtqError: the models or the port cannot be had.
    """
    begun = time.monotonic()
    require("fastapi")
    own = sys.stdout
    # Ray prints to standard output what it has to say; there stands only what `announce` prints.
    with redirect_stdout(sys.stderr), _ray() as (logs, joined), _stopping() as stops:
        options = _started(options, joined)
        try:
            front = _deployed(options)
            facts = {
                "url": _checked_url(options),
                "models": front.models.remote().result(),
                "seconds": round(time.monotonic() - begun, 3),
                "replicas": [options.min_replicas, options.max_replicas],
                "logs": logs,
            }
            with redirect_stdout(own):
                announce(facts)
            while not stops.wait(1):
                pass
            _drain(front, options.drain_s, stops)
        finally:
            # Nothing is under way any more but the last bytes of answers, which Ray waits for.
            serve = require("ray.serve")
            if joined:
                serve.delete(_NAME)
            else:
                serve.shutdown()


class _Stops:
    """Counts the signals that ask for the end."""

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
    """A Ray; gives the folder of its logs and whether it ran before.

    Raises:
        UsageError: RAY_ADDRESS is that of a proxy into a cluster.
        ArtefactError: there is no Ray at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS={address} leads into a cluster from outside; on one of its machines use "
            "RAY_ADDRESS=auto, or 'serve run trtq.serve.ray:app'"
        )
    _check_reachable(address)
    ray, _ = require("ray"), require("ray.serve")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its own messages would stand between our lines, of which each is one JSON object.
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
    """Raises ArtefactError where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as err:
            raise ArtefactError(f"there is no Ray at RAY_ADDRESS={address}: {err}") from err


def _started(options: RayOptions, joined: bool) -> RayOptions:
    """Start Ray Serve at the address asked for; a port of 0 is replaced by one that is free.

    Raises:
        ArtefactError: the port cannot be had, or an application of this name runs there.
    """
    serve = require("ray.serve")
    running = serve.status() if joined else None
    if running is None or not running.proxies:
        with listen(options.host, options.port) as free:
            options = replace(options, port=free.getsockname()[1])
        serve.start(http_options={"host": options.host, "port": options.port})
    elif _NAME in running.applications:
        raise ArtefactError(
            f"Ray Serve already runs an application {_NAME!r} here; end it first, or run "
            "'serve run trtq.serve.ray:app --name NAME --route-prefix /NAME path=...'"
        )
    return options


def _deployed(options: RayOptions) -> Any:
    """Run the application; gives the handle of its front.

    Raises:
        ArtefactError: a replica could not be started, or another application is in the way.
    """
    serve = require("ray.serve")
    try:
        return serve.run(app(options), name=_NAME, route_prefix="/")
    except (RuntimeError, require("ray.serve.exceptions").RayServeException) as err:
        found = serve.status().applications.get(_NAME)
        told = [] if found is None else [one.message for one in found.deployments.values()]
        raise ArtefactError(f"the replicas do not start: {_reason([str(err), *told])}") from err


def _reason(texts: list[str]) -> str:
    """What stands last in the tracebacks that Ray gives, or the first text's last line."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    ours = [found[2] for line in lines if (found := _ERROR.match(line))]
    return ours[-1] if ours else texts[0].strip().rpartition("\n")[2]


def _checked_url(options: RayOptions) -> str:
    """Where the server is.

    Raises:
        ArtefactError: it is elsewhere, as Ray Serve ran before.
    """
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}"
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=_GRACE_S):
            return url
    except OSError as err:
        raise ArtefactError(
            f"Ray Serve does not answer at {url} ({err}); it ran before and listens elsewhere: give its "
            "--host and --port, or end it with 'serve shutdown'"
        ) from err


def _drain(front: Any, seconds: float, stops: _Stops) -> None:
    """Have the front finish what it has; asked a second time: now."""
    end = time.monotonic() + seconds + _GRACE_S
    draining = front.drain.remote(seconds)
    hurried = False
    while True:
        try:
            draining.result(timeout_s=_POLL_S)
            return
        except TimeoutError:
            if time.monotonic() > end:
                logger.warning("giving up", extra={FIELDS: {"reason": "no answer of the front"}})
                return
        if stops.count > 1 and not hurried:
            hurried = True
            front.drain.remote(0.0)
