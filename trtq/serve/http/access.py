"""Access control: the hosts that a server answers to, and the origins whose pages may use it.

A browser lets any page send requests to any address. Two headers distinguish such requests from the
user's own: `Host`, the name of the server in the page's URL (the author of a page can let a name
resolve to 127.0.0.1: DNS rebinding), and `Origin`, the origin of the page. Programs send no `Origin`.
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
_SAME_SITE = (b"same-origin", b"none")
_PORTS = {"http": 80, "https": 443}
_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_AUTHORITY = re.compile(rf"(?:\[([0-9a-f:.]+)\]|({_NAME})\.?)(?::([0-9]{{0,5}}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#\s@]+)/?")
_ALLOWED = re.compile(rf"\*|(?:\*\.)?{_NAME}")
_MAX_AUTHORITY = 260
_FIELD_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1024}")

Headers = Sequence[tuple[bytes, bytes]]


def _address(text: str) -> str | None:
    """An IP address in canonical form, for comparison; None if the text is a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def _parse(authority: str) -> tuple[str, int | None] | None:
    """`NAME:PORT` -> the lower-case name or the canonical address, and the port; None if malformed."""
    match = _AUTHORITY.fullmatch(authority.lower())
    if match is None or len(authority) > _MAX_AUTHORITY:
        return None
    name, inside = match[2], match[1] or ""
    host = _address(name) or name if name else _address(inside) if ":" in inside else None
    port = int(match[3]) if match[3] else None
    return None if host is None or (port or 0) > 65535 else (host, port)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (
        _address(host) is not None and ipaddress.ip_address(host).is_loopback
    )


def allowed_hosts(texts: Iterable[str]) -> tuple[str, ...]:
    """Normalise values of `--allowed-host` for `Access`.

    Raises:
        UsageError: a value is neither a host name nor an address.
    """
    hosts = []
    for text in texts:
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
                "and without a port, e.g. --allowed-host images.example; *.images.example means all "
                "names below it, '*' all names"
            )
        hosts.append(address or name)
    return tuple(hosts)


def allowed_origins(texts: Iterable[str]) -> tuple[str, ...]:
    """Normalise values of `--allowed-origin` to the form that browsers send.

    Raises:
        UsageError: a value is not an origin.
    """
    origins = []
    for text in texts:
        origin = _normal_origin(text.strip())
        if origin is None:
            raise UsageError(
                f"the origin {text[:80]!r} is not understood; write the beginning of the page's URL, "
                "e.g. --allowed-origin http://localhost:3000; '*' means all pages"
            )
        origins.append(origin)
    return tuple(origins)


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
    """The hosts and origins that a server answers to.

    Loopback names and addresses, and the local address of a connection, are always allowed: an address
    of the machine itself, which the probes of Kubernetes and Prometheus send, is safe, and all other
    names must be allowed explicitly.

    Attributes:
        bound: address or name that the server listens on; if it is a wildcard, the machine's name is
            allowed, too.
        hosts: additional hosts, as `allowed_hosts` returns them.
        origins: other origins whose pages may use the server, as `allowed_origins` returns them.
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
        """Warnings about this configuration for the operator."""
        texts = []
        if ANY in self.hosts:
            texts.append("every host is allowed: any page can reach this server by DNS rebinding")
        if ANY in self.origins:
            texts.append(
                "every origin is allowed: any page in a browser can send requests to this server"
            )
        return texts

    def check(self, scope: Any) -> None:
        """Raise unless the server may answer a request.

        Args:
            scope: ASGI scope of the request.

        Raises:
            ApiError: 400 the request does not have exactly one valid host; 421 the server does not
                answer to this host; 403 the request is from a page of another site.
        """
        headers: Headers = scope["headers"]
        values = [value for name, value in headers if name == b"host"]
        # Only HTTP/1.0 allows requests without a host, and no browser sends those.
        host = None
        if values or scope.get("http_version") != "1.0":
            host = self._checked_host(values, scope)
        if scope["method"] not in _SAFE:
            self._check_origin(headers, host)

    def _checked_host(self, values: list[bytes], scope: Any) -> tuple[str, int | None]:
        if len(values) != 1:
            count = len(values) or "no"
            raise ApiError(
                400, "invalid_host", f"the request has {count} Host headers; send exactly one"
            )
        text = values[0].decode("latin-1").strip()
        parsed = _parse(text)
        if parsed is None:
            raise ApiError(
                400,
                "invalid_host",
                f"{printable(text)!r} is not a valid host; send NAME or NAME:PORT as Host",
            )
        if not self._answers_to(parsed[0], (scope.get("server") or ("",))[0]):
            raise ApiError(
                421,
                "host_not_allowed",
                f"this server does not answer to the host {printable(text)!r}, only to localhost and "
                "its own address; use one of these, or start the server with "
                f"--allowed-host {parsed[0]}",
            )
        return parsed

    def _answers_to(self, host: str, local: str) -> bool:
        if _is_loopback(host) or host in self._names or ANY in self._names:
            return True
        if any(name.startswith("*.") and host.endswith(name[1:]) for name in self.hosts):
            return True
        return bool(local) and host == _address(local)

    def _check_origin(self, headers: Headers, host: tuple[str, int | None] | None) -> None:
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        sites = [value.strip().lower() for name, value in headers if name == b"sec-fetch-site"]
        if origins and all(map(self.allows_origin, origins)):
            return
        foreign = [origin for origin in origins if not _is_same_origin(origin, host)]
        if foreign:
            raise ApiError(
                403,
                "origin_not_allowed",
                f"pages of {printable(foreign[0])!r} may not use this server; to allow them, start it "
                "with --allowed-origin and their origin",
            )
        if any(site not in _SAME_SITE for site in sites):
            raise ApiError(
                403,
                "origin_not_allowed",
                "pages of other sites may not use this server; to allow them, start it with "
                "--allowed-origin and their origin",
            )

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may use the server although they belong to another site."""
        return bool(self.origins) and (
            ANY in self.origins or _normal_origin(origin) in self.origins
        )

    def cors(self, scope: Any) -> list[tuple[bytes, bytes]]:
        """The headers that allow a page of an allowed origin to read the response."""
        if not self.origins:
            return []
        headers = [(b"vary", b"Origin")]
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if len(origins) == 1 and self.allows_origin(origins[0].decode("latin-1")):
            headers += [
                (b"access-control-allow-origin", origins[0]),
                (b"access-control-expose-headers", b"X-Request-ID, Retry-After, X-Should-Retry"),
            ]
        return headers

    def preflight(self, scope: Any) -> list[tuple[bytes, bytes]] | None:
        """The headers of the response to a CORS preflight; None if the request is not a preflight."""
        sent = dict(scope["headers"])
        if scope["method"] != "OPTIONS" or b"access-control-request-method" not in sent:
            return None
        if len(self.cors(scope)) < 2:
            return None
        headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST"),
            (b"access-control-max-age", b"600"),
        ]
        names = sent.get(b"access-control-request-headers", b"")
        if _FIELD_NAMES.fullmatch(names):
            headers.append((b"access-control-allow-headers", names))
        if sent.get(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        return headers


def _is_same_origin(origin: str, host: tuple[str, int | None] | None) -> bool:
    """Whether an origin is the origin of the server's own page: same host, same port."""
    parts = _ORIGIN.fullmatch(origin.lower())
    if parts is None or parts[1] not in _PORTS or host is None:
        return False
    port = _PORTS[parts[1]]
    parsed = _parse(parts[2])
    return parsed is not None and (parsed[0], parsed[1] or port) == (host[0], host[1] or port)
