"""Pages of other sites cannot use a server under any host name; the server's own page can."""

import contextlib
import json
import re
import socket

import httpx
import pytest

from tests.serve.conftest import ToyModel, running
from tests.serve.http.test_app import KEY, PATH
from trtq.errors import UsageError
from trtq.serve.http import protocol
from trtq.serve.http.access import Access, allowed_hosts, allowed_origins
from trtq.serve.http.app import create_app
from trtq.serve.metrics import Metrics
from trtq.serve.options import Limits
from trtq.serve.served import ServedModel
from trtq.serve.service import Service

BODY = json.dumps({"prompt": "one", "steps": 1})
GETS = (
    "/", "/v1/models", "/v1/models/toy", "/healthz", "/readyz", "/v2/health/live",
    "/v2/health/ready", "/v2/models/toy/ready", "/metrics", "/openapi.json",
)  # fmt: skip


@contextlib.contextmanager
def serving(model, api_key=None, **access):
    """Run a server with these access options and yield its port."""
    metrics = Metrics()
    service = Service({"toy": ServedModel(model, Limits(), "step", metrics)}, Limits())
    app = create_app(service, metrics, api_key, Access(**access))
    with running(app, http=protocol.BoundedProtocol) as url:
        yield httpx.URL(url).port
    service.close()


@pytest.fixture
def serve(toy):
    """A function that starts a server with these access options and returns its port."""
    with contextlib.ExitStack() as stack:
        yield lambda *given, **access: stack.enter_context(serving(toy, *given, **access))


@pytest.fixture(scope="module")
def model():
    return ToyModel()


@pytest.fixture(scope="module")
def port(model):
    """The port of a server with the default options."""
    with serving(model) as number:
        yield number


@pytest.fixture
def untouched(model):
    """Check that the denoiser is not called."""
    calls = len(model.calls)
    yield
    assert len(model.calls) == calls


class Answer:
    """The response on a connection, read up to its end."""

    def __init__(self, raw):
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        pairs = [line.split(": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}

    @property
    def error(self):
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        return json.loads(self.body)["error"]


def send(port, raw):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(raw)
        raw_answer = b""
        while part := connection.recv(1 << 16):
            raw_answer += part
    return Answer(raw_answer)


def ask(port, *lines, method="GET", path="/v1/models", body=""):
    """Send a request with exactly these header lines on a new connection."""
    lines = [*lines, "Connection: close"]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{line}\r\n" for line in lines)
    return send(port, (head + "\r\n" + body).encode("latin-1"))


def draw(port, *lines):
    return ask(port, *lines, method="POST", path=PATH, body=BODY)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST", "localhost.", "localhost:1", "localhost:", "LocalHost.:8000",
        "127.0.0.1", "127.0.0.1:65535", "127.9.9.9", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]:80",
    ],
)  # fmt: skip
def test_requests_to_loopback_names_are_answered(port, host):
    assert ask(port, f"Host: {host}").status == 200
    assert draw(port, f"Host: {host}").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "EVIL.EXAMPLE", "evil.example.", "localhost.evil.example",
        "127.0.0.1.evil.example", "127-0-0-1.evil.example", "evil-localhost", "x.localhost",
        "localhost.localdomain", "8.8.8.8", "10.0.0.1:8000", "[2001:db8::1]", "[fe80::1]:80",
        "[::ffff:8.8.8.8]", "0.0.0.0", "[::]", "0x7f000001", "2130706433", "0177.0.0.1", "127.1",
        "169.254.169.254", "metadata.google.internal",
    ],
)  # fmt: skip
def test_other_names_are_refused(port, untouched, host):
    for answer in (ask(port, f"Host: {host}"), draw(port, f"Host: {host}")):
        assert answer.status == 421
        assert answer.error["code"] == "host_not_allowed"
        assert "--allowed-host" in answer.error["message"]


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Host:",),
        ("Host: localhost", "Host: localhost"),
        ("Host: localhost", "Host: evil.example"),
        ("Host: evil.example", "Host: localhost"),
        ("Host: user@localhost",),
        ("Host: evil.example@localhost",),
        ("Host: localhost@evil.example",),
        ("Host: localhost, evil.example",),
        ("Host: localhost evil.example",),
        ("Host: localhost/",),
        ("Host: http://localhost",),
        ("Host: localhost:99999",),
        ("Host: localhost:port",),
        ("Host: localhost:80:80",),
        ("Host: localhost..",),
        ("Host: .localhost",),
        ("Host: ::1",),
        ("Host: [::1",),
        ("Host: [::1]evil.example",),
        ("Host: [127.0.0.1]",),
        ("Host: [::1%25lo]",),
        ("Host: l\xf6calhost",),
        ("Host: " + "a" * 300,),
    ],
    ids=lambda lines: "|".join(lines)[:50],
)
def test_a_request_without_exactly_one_valid_host_is_refused(port, untouched, lines):
    for answer in (ask(port, *lines), draw(port, *lines)):
        assert answer.status == 400
        assert answer.error["code"] == "invalid_host"


def test_a_probe_of_http_1_0_need_not_name_a_host(port):
    assert send(port, b"GET /healthz HTTP/1.0\r\n\r\n").status == 200


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/v1/models", "localhost", 200),
        ("http://LOCALHOST:80/v1/models", "localhost:80", 200),
        ("http://evil.example/v1/models", "localhost", 400),
        ("http://localhost/v1/models", "evil.example", 400),
        ("http://evil.example/v1/models", "evil.example", 421),
        ("http://user@localhost/v1/models", "user@localhost", 400),
        ("https://evil.example", "localhost", 400),
        ("http://localhost", "localhost", 200),
        ("http://localhost?x=1", "localhost", 200),
        ("ftp://localhost/v1/models", "localhost", 400),
        ("//evil.example/v1/models", "localhost", 404),
        ("localhost/v1/models", "localhost", 400),
    ],
)
def test_the_host_of_an_absolute_target_is_checked(port, target, host, status):
    answer = ask(port, f"Host: {host}", path=target)
    assert answer.status == status
    if status != 200:
        assert answer.error["message"]


def test_names_can_be_allowed(serve):
    port = serve(
        hosts=allowed_hosts(["Images.Example.", "*.pods.example", "2001:db8::1", "bücher.de"])
    )
    for host in (
        "images.example", "IMAGES.example:443", "a.pods.example", "a.b.pods.example", "[2001:DB8::1]",
        "xn--bcher-kva.de", "localhost",
    ):  # fmt: skip
        assert ask(port, f"Host: {host}").status == 200
    for host in ("pods.example", "evilpods.example", "example", "images.example.evil.example"):
        assert ask(port, f"Host: {host}").status == 421


def test_all_names_can_be_allowed_with_a_warning(serve):
    access = Access(hosts=allowed_hosts(["*"]))
    port = serve(hosts=access.hosts)
    assert ask(port, "Host: evil.example").status == 200
    assert ask(port, "Host: evil.example", "Host: b.example").status == 400
    assert "every host is allowed" in access.warnings[0]
    assert Access().warnings == []


def scope(host, server="10.1.2.3", method="GET"):
    return {"headers": [(b"host", host.encode())], "server": (server, 8000), "method": method}


def test_the_local_address_of_a_connection_is_allowed_for_probes():
    everywhere = Access(bound="0.0.0.0")
    everywhere.check(scope("10.1.2.3:8000"))
    everywhere.check(scope("0.0.0.0:8000"))
    everywhere.check(scope(f"{socket.gethostname()}:8000"))
    everywhere.check(scope("[fe80::1]:8000", server="fe80::1%eth0"))
    everywhere.check(scope("10.1.2.3", server="::ffff:10.1.2.3"))
    for host in ("10.1.2.4", "evil.example", "8.8.8.8"):
        with pytest.raises(Exception, match="does not answer to the host"):
            everywhere.check(scope(host))


def test_the_name_that_the_server_listens_on_is_allowed():
    Access(bound="Box.Example").check(scope("box.example:8000"))
    Access(bound="192.168.1.5").check(scope("192.168.1.5:8000", server="192.168.1.5"))
    with pytest.raises(Exception, match="does not answer"):
        Access(bound="192.168.1.5").check(scope(socket.gethostname() + "x"))


@pytest.mark.parametrize(
    "lines",
    [
        ("Origin: http://evil.example",),
        ("Origin: https://evil.example:8000",),
        ("Origin: null",),
        ("Origin:",),
        ("Origin: http://localhost:PORT.evil.example",),
        ("Origin: http://localhost:1",),
        ("Origin: http://localhost",),
        ("Origin: http://127.0.0.1:PORT",),
        ("Origin: http://evil@localhost:PORT",),
        ("Origin: ftp://localhost:PORT",),
        ("Origin: chrome-extension://abcdef",),
        ("Origin: file://",),
        ("Origin: http://localhost:PORT", "Origin: http://evil.example"),
        ("Origin: http://localhost:PORT http://evil.example",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site",),
        ("Sec-Fetch-Site: Cross-Site",),
        ("Sec-Fetch-Site: nonsense",),
        ("Origin: http://localhost:PORT", "Sec-Fetch-Site: cross-site"),
    ],
    ids=lambda lines: "|".join(lines),
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/nothing"])
def test_pages_of_other_sites_are_refused(port, untouched, lines, path):
    lines = [line.replace("PORT", str(port)) for line in lines]
    answer = ask(port, f"Host: localhost:{port}", *lines, method="POST", path=path, body=BODY)
    assert answer.status == 403
    assert answer.error["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "origin", "site"),
    [
        ("localhost:PORT", "http://localhost:PORT", "same-origin"),
        ("LOCALHOST:PORT", "http://localhost:PORT", None),
        ("127.0.0.1:PORT", "http://127.0.0.1:PORT", "same-origin"),
        ("[::1]:PORT", "http://[::1]:PORT", "same-origin"),
        ("localhost", "http://localhost", None),
        ("localhost", "https://localhost", None),
        ("localhost:80", "http://localhost", None),
        ("localhost", None, "none"),
        ("localhost", None, None),
    ],
)
def test_the_servers_page_and_programs_can_draw(port, host, origin, site):
    lines = [f"Host: {host}"]
    lines += [f"Origin: {origin}"] if origin else []
    lines += [f"Sec-Fetch-Site: {site}"] if site else []
    answer = draw(port, *(line.replace("PORT", str(port)) for line in lines))
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "text/plain; application/json", "application/jsonx", ""],
)  # fmt: skip
def test_content_types_that_forms_can_send_are_refused(port, untouched, kind):
    raw = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    raw += f"Content-Type: {kind}\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"
    answer = send(port, raw.encode())
    assert answer.status == 415
    assert answer.error["code"] == "unsupported_media_type"


def test_by_default_no_page_is_allowed_by_cors(port):
    answer = ask(port, "Host: localhost", "Origin: http://evil.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = ("Access-Control-Request-Method: POST", "Origin: http://evil.example")
    answer = ask(port, "Host: localhost", *preflight, method="OPTIONS", path=PATH)
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_an_allowed_origin_can_draw_and_read_the_response(serve):
    port = serve(api_key=KEY, origins=allowed_origins(["http://LOCALHOST:3000/", "null"]))
    origin = "Origin: http://localhost:3000"
    foreign = ("Host: localhost", origin, "Sec-Fetch-Site: same-site")
    preflight = ask(
        port, *foreign, "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network: true", method="OPTIONS", path=PATH,
    )  # fmt: skip
    assert (preflight.status, preflight.body) == (204, b"")
    allowed = preflight.headers["access-control-allow-headers"]
    assert allowed == "authorization,content-type,x-stainless-os"
    assert preflight.headers["access-control-allow-methods"] == "GET, HEAD, POST"
    assert preflight.headers["access-control-allow-private-network"] == "true"
    drawn = draw(port, *foreign, f"Authorization: Bearer {KEY}")
    assert drawn.status == 200
    for answer in (preflight, drawn, draw(port, *foreign)):  # The last one lacks the key.
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["vary"] == "Origin"
    assert draw(port, *foreign).status == 401
    for other in ("http://localhost:3001", "https://localhost:3000", "http://evil.example"):
        refused = draw(port, "Host: localhost", f"Origin: {other}", f"Authorization: Bearer {KEY}")
        assert refused.status == 403
        assert "access-control-allow-origin" not in refused.headers
        assert refused.headers["vary"] == "Origin"
    assert draw(port, "Host: evil.example", origin).status == 421


def test_with_a_key_foreign_hosts_and_origins_are_refused_first(serve):
    port = serve(api_key=KEY)
    key = f"Authorization: Bearer {KEY}"
    assert draw(port, "Host: localhost", key).status == 200
    assert draw(port, "Host: evil.example", key).status == 421
    assert draw(port, "Host: localhost", key, "Origin: null").status == 403
    assert ask(port, "Host: evil.example", path="/healthz").status == 421


@pytest.mark.parametrize(
    "text",
    ["", "http://images.example", "images.example:8000", "a b", "*.*", "x/y", "[::1]:80", "*x"],
)
def test_invalid_hosts_are_refused_at_the_start(text):
    with pytest.raises(UsageError, match=re.escape(f"the host {text!r} is not understood")):
        allowed_hosts([text])


@pytest.mark.parametrize(
    "text",
    ["", "images.example", "http://", "http://a/b", "http://a:99999", "http://u@a", "a b://c"],
)
def test_invalid_origins_are_refused_at_the_start(text):
    with pytest.raises(UsageError, match=re.escape(f"the origin {text!r} is not understood")):
        allowed_origins([text])


def test_origins_are_written_as_browsers_write_them():
    given = [
        "HTTP://A.example:80/",
        "https://a.example:443",
        "http://a.example:8080",
        "tauri://localhost",
    ]
    assert allowed_origins(given) == (
        "http://a.example", "https://a.example", "http://a.example:8080", "tauri://localhost",
    )  # fmt: skip


@pytest.mark.parametrize("path", [*GETS, "/nothing", "/v1/models/none"])
def test_head_is_get_without_the_body(port, path):
    get, head = (ask(port, "Host: localhost", method=m, path=path) for m in ("GET", "HEAD"))
    assert (head.status, head.body) == (get.status, b"")
    assert get.body
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize(
    "method", ["OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND", "BREW", "get"]
)
@pytest.mark.parametrize("path", [*GETS, PATH])
def test_other_methods_are_405_and_name_the_allowed_methods(port, method, path):
    answer = ask(port, "Host: localhost", method=method, path=path)
    assert answer.status == 405
    assert answer.error["code"] == "method_not_allowed"
    if method in ("BREW", "get"):  # The parser refuses the method before it reads the path.
        assert answer.headers["allow"] == "GET, HEAD, POST"
    else:
        assert answer.headers["allow"] == ("POST" if path == PATH else "GET, HEAD")


def test_other_pages_cannot_show_or_run_a_response(port):
    for path in (*GETS, "/nothing"):
        headers = ask(port, "Host: localhost", path=path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    page = ask(port, "Host: localhost", path="/").headers
    assert page["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in page["content-security-policy"]
    assert page["referrer-policy"] == "no-referrer"
