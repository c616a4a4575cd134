"""Who may ask: the hosts that a server answers to, and the origins whose pages may use it.

A browser sends requests of any page to any address. Two things tell them from the user's own: the `Host`
that the page's author called the server by (a name of his may be made to point at 127.0.0.1: DNS
rebinding), and the `Origin` of the page. Programs send no `Origin`, and the host that they were given.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtq.errors import UsageError
from trtq.serve.http.errors import ApiError, printable

__all__ = ["Access", "allowed_hosts", "allowed_origins"]

ANY = "*"
_SAFE = ("GET", "HEAD", "OPTIONS", "TRACE")
_OWN_SITE = (b"same-origin", b"none")
_PORTS = {"http": 80, "https": 443}
_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_AUTHORITY = re.compile(rf"(?:\[([0-9a-f:.]+)\]|({_NAME})\.?)(?::([0-9]{{0,5}}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#\s@]+)/?")
_ALLOWED = re.compile(rf"\*|(?:\*\.)?{_NAME}")
_FIELD_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")

Headers = Sequence[tuple[bytes, bytes]]


def _address(text: str) -> str | None:
    """An IP address in the one form that two of them can be compared in; None for a name."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return str(getattr(found, "ipv4_mapped", None) or found)


def _parse(authority: str) -> tuple[str, int | None] | None:
    """`NAME:PORT` -> the name in small letters, or the address, and the port; None: it is neither."""
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None or len(authority) > 260:
        return None
    name, inside = found[2], found[1] or ""
    host = _address(name) or name if name else _address(inside) if ":" in inside else None
    port = int(found[3]) if found[3] else None
    return None if host is None or (port or 0) > 65535 else (host, port)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (
        _address(host) is not None and ipaddress.ip_address(host).is_loopback
    )


def allowed_hosts(given: Iterable[str]) -> tuple[str, ...]:
    """Values of `--allowed-host` in the form that `Access` compares.

    Raises:
        UsageError: one is no name or address.
    """
    found = []
    for text in given:
        name = text.strip().lower().removeprefix("[").removesuffix("]").rstrip(".")
        if not name.isascii():
            try:
                name = name.encode("idna").decode()
            except UnicodeError:
                name = ""
        address = _address(name)
        if address is None and not _ALLOWED.fullmatch(name):
            raise UsageError(
                f"the host {text[:80]!r} is not understood; write a name or an address without http:// "
                "and without a port, e.g. --allowed-host images.example; *.images.example stands for "
                "the names below it, '*' for all"
            )
        found.append(address or name)
    return tuple(found)


def allowed_origins(given: Iterable[str]) -> tuple[str, ...]:
    """Values of `--allowed-origin` as browsers write them.

    Raises:
        UsageError: one is no origin.
    """
    found = []
    for text in given:
        origin = _normal_origin(text.strip())
        if origin is None:
            raise UsageError(
                f"the origin {text[:80]!r} is not understood; write what the page's address begins "
                "with, e.g. --allowed-origin http://localhost:3000; '*' stands for all pages"
            )
        found.append(origin)
    return tuple(found)


def _normal_origin(text: str) -> str | None:
    text = text.lower()
    if text in (ANY, "null"):
        return text
    parts = _ORIGIN.fullmatch(text)
    if parts is None:
        return None
    scheme, authority = parts[1], parts[2]
    if scheme not in _PORTS:
        return f"{scheme}://{authority}"
    parsed = _parse(authority)
    if parsed is None:
        return None
    host, port = parsed
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}" + ("" if port in (None, _PORTS[scheme]) else f":{port}")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a server answers to.

    Loopback names and addresses, and the address that a connection came to, are always among the hosts:
    so an address is right where it is the machine's own, as the probes of Kubernetes and Prometheus have
    it, and a name has to be allowed.

    Attributes:
        bound: what the server was told to listen at; where that is all addresses, the machine's own name
            is a host, too.
        hosts: further ones, as `allowed_hosts` gives them.
        origins: of pages that may use the server from elsewhere, as `allowed_origins` gives them.
    """

    bound: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    _names: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bound = _address(self.bound) or self.bound.lower().rstrip(".")
        names = {bound, *self.hosts}
        if bound in ("0.0.0.0", "::", ""):
            names.add(socket.gethostname().lower())
        object.__setattr__(self, "_names", frozenset(names - {""}))

    @property
    def warnings(self) -> list[str]:
        """What an operator ought to know of it."""
        found = []
        if ANY in self.hosts:
            found.append("every host is allowed: any page can reach this server by DNS rebinding")
        if ANY in self.origins:
            found.append(
                "every origin is allowed: any page in a browser can send requests to this server"
            )
        return found

    def check(self, scope: Any) -> None:
        """Nothing, if a request may be answered.

        Args:
            scope: of ASGI.

        Raises:
            ApiError: 400 there is no host, several, or one that is none; 421 the server does not
                answer to it; 403 another site's page wants something done.
        """
        headers: Headers = scope["headers"]
        given = [value for name, value in headers if name == b"host"]
        # Only HTTP/1.0 knows requests without it, and no browser sends those.
        host = None
        if given or scope.get("http_version") != "1.0":
            host = self._checked_host(given, scope)
        if scope["method"] not in _SAFE:
            self._check_origin(headers, host)

    def _checked_host(self, given: list[bytes], scope: Any) -> tuple[str, int | None]:
        if len(given) != 1:
            told = "names no host" if not given else f"names {len(given)} hosts"
            raise ApiError(400, "invalid_host", f"the request {told}; send one Host header")
        text = given[0].decode("latin-1").strip()
        parsed = _parse(text)
        if parsed is None:
            raise ApiError(
                400,
                "invalid_host",
                f"{printable(text)!r} is no host; send NAME or NAME:PORT as Host",
            )
        if not self._answers_to(parsed[0], (scope.get("server") or ("",))[0]):
            raise ApiError(
                421,
                "host_not_allowed",
                f"this server does not answer to the host {printable(text)!r}, but to localhost and its "
                f"own address; use one of them, or start it with --allowed-host {parsed[0]}",
            )
        return parsed

    def _answers_to(self, host: str, local: str) -> bool:
        if _is_loopback(host) or host in self._names or ANY in self._names:
            return True
        if any(one.startswith("*.") and host.endswith(one[1:]) for one in self.hosts):
            return True
        return bool(local) and host == _address(local)

    def _check_origin(self, headers: Headers, host: tuple[str, int | None] | None) -> None:
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        sites = [value.strip().lower() for name, value in headers if name == b"sec-fetch-site"]
        if origins and all(map(self.allows_origin, origins)):
            return
        foreign = [origin for origin in origins if not _is_own(origin, host)]
        if foreign:
            raise ApiError(
                403,
                "origin_not_allowed",
                f"a page of {printable(foreign[0])!r} may not use this server; start it with "
                "--allowed-origin and the page's origin if it should",
            )
        if any(site not in _OWN_SITE for site in sites):
            raise ApiError(
                403,
                "origin_not_allowed",
                "a page of another site may not use this server; start it with --allowed-origin and the "
                "page's origin if it should",
            )

    def allows_origin(self, origin: str) -> bool:
        """Whether the pages of an origin may use the server from elsewhere."""
        return bool(self.origins) and (
            ANY in self.origins or _normal_origin(origin) in self.origins
        )

    def cors(self, scope: Any) -> list[tuple[bytes, bytes]]:
        """The headers by which a browser lets a page of an allowed origin read the answer."""
        if not self.origins:
            return []
        found = [(b"vary", b"Origin")]
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if len(origins) == 1 and self.allows_origin(origins[0].decode("latin-1")):
            found += [
                (b"access-control-allow-origin", origins[0]),
                (b"access-control-expose-headers", b"X-Request-ID, Retry-After, X-Should-Retry"),
            ]
        return found

    def preflight(self, scope: Any) -> list[tuple[bytes, bytes]] | None:
        """The headers that answer a browser which asks before it sends; None where it does not."""
        given = dict(scope["headers"])
        if scope["method"] != "OPTIONS" or b"access-control-request-method" not in given:
            return None
        if len(self.cors(scope)) < 2:
            return None
        found = [
            (b"access-control-allow-methods", b"GET, HEAD, POST"),
            (b"access-control-max-age", b"600"),
        ]
        wanted = given.get(b"access-control-request-headers", b"")
        if _FIELD_NAMES.fullmatch(wanted):
            found.append((b"access-control-allow-headers", wanted))
        if given.get(b"access-control-request-private-network") == b"true":
            found.append((b"access-control-allow-private-network", b"true"))
        return found


def _is_own(origin: str, host: tuple[str, int | None] | None) -> bool:
    """Whether an origin is that of the server's own page: same host, same port."""
    parts = _ORIGIN.fullmatch(origin.lower())
    if parts is None or parts[1] not in _PORTS or host is None:
        return False
    port = _PORTS[parts[1]]
    parsed = _parse(parts[2])
    return parsed is not None and (parsed[0], parsed[1] or port) == (host[0], host[1] or port)
