"""Only connections without a request or with an endless head are closed."""

import asyncio
import contextlib
import json
import socket
import time
from functools import partial

import httpx
import pytest

from tests.serve.conftest import running
from trtq.serve.http import protocol


async def application(scope, receive, send):
    """Answer 200 after the body has arrived, at once or later, depending on the request's path."""
    assert scope["path"] != "/bad"
    while scope["path"] != "/at-once" and (message := await receive()).get("more_body"):
        if message["type"] == "http.disconnect":
            return
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    if scope["path"] == "/never":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    path = scope["path"].encode()
    headers = [(b"content-length", b"%d" % len(path))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": path})


REFUSED: list[tuple[int, str]] = []
"""Status and code of each refused request."""


@pytest.fixture(scope="module")
def address():
    http = partial(
        protocol.BoundedProtocol, refused=lambda status, code: REFUSED.append((status, code))
    )
    with running(application, http=http, limit_concurrency=20) as url:
        yield url


def connect(address):
    url = httpx.URL(address)
    return socket.create_connection((url.host, url.port), timeout=10)


def one_answer(connection):
    answer = b""
    while b"\r\n\r\n" not in answer or answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(10_000)
    return answer


def send_until_hung_up_on(connection, piece, pause=0.01):
    for _ in range(1000):
        connection.sendall(piece)
        time.sleep(pause)


def ask(address, *parts):
    """Send all parts and return the bytes up to the end of the connection."""
    with connect(address) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionError:
            pass
        return answer


def refusal(raw):
    """Status, code and message of a response, which must be a single error in OpenAI's format."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    assert headers["content-length"] == str(len(body))
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(first.split()[1]), error["code"], error["message"]


def test_valid_requests_pass(address):
    with httpx.Client(base_url=address) as client:
        for size in (0, 1, 200_000):
            assert client.post("/", content=b"x" * size, headers={"X": "y" * 50_000}).text == "/"


@pytest.mark.parametrize("line", [b"X: ", b"X: y\r\n"], ids=["one header", "many headers"])
def test_a_head_without_end_is_refused(address, line):
    with connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + line)
        answer = b""
        try:
            for _ in range(400):
                connection.sendall(line * 100)
                time.sleep(0.001)
            answer = connection.recv(1000)
        except ConnectionError:
            return  # The server refused the request while the test was still sending.
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_a_connection_without_a_complete_head_is_closed_in_time(address, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        assert connection.recv(10) == b""
    for begin in (b"G", b"GET / HTTP/1.1\r\nHost:", b"\r\n\r\nGET /"):
        assert refusal(ask(address, begin))[:2] == (408, "head_timeout")


def test_a_body_may_take_longer_than_a_head(address, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    with connect(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(0.5)
        connection.sendall(b"b")
        assert one_answer(connection).startswith(b"HTTP/1.1 200")


HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status", "message"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "begin the address with http://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "this is HTTP/2"),
        (b"GET /\r\n\r\n", 400, "not 0.9"),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400, "not 2.0"),
        (b"GET / HTTP/1.9\r\nHost: x\r\n\r\n", 400, "HTTP/1.1"),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400, "CRLF"),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400, "not valid HTTP/1.1"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "not valid HTTP/1.1"),
        (b"GET /\0 HTTP/1.1\r\n\r\n", 400, "not valid HTTP/1.1"),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400, "'*' is not a path"),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405, "no method 'CONNECT' here, but GET"),
        (b"BREW /coffee HTTP/1.1\r\nHost: x\r\n\r\n", 405, "no method 'BREW'"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", 400, "not valid HTTP/1.1"),
        (b"GET", 408, "head did not arrive"),
        (b"\xff\xfe\0\0", 400, "not valid HTTP/1.1"),
        (GET + b"Name : x\r\n\r\n", 400, "Invalid header token"),
        (GET + b"no colon\r\n\r\n", 400, "Invalid header token"),
        (GET + b": x\r\n\r\n", 400, "Invalid header token"),
        (GET + b"A: b\0c\r\n\r\n", 400, "Invalid header value"),
        (GET + b"A: b\r\n folded\r\n\r\n", 400, "whitespace"),
        (GET + b"A: b\rc\r\n\r\n", 400, "not valid HTTP/1.1"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nab", 400, "Duplicate Content-Length"),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nab", 400, "Duplicate Content-Length"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "Content-Length"),
        (HEAD + b"Content-Length: 2, 2\r\n\r\n", 400, "Content-Length"),
        (HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400, "overflow"),
        (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Encoding"),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", 400, "Length"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400, "Transfer-Encoding"),
        (CHUNKED + b"zz\r\n", 400, "chunk size"),
        (CHUNKED + b"-1\r\n", 400, "chunk size"),
        (CHUNKED + b"F" * 20 + b"\r\n", 400, "overflow"),
        (CHUNKED + b"2\r\nabXX", 400, "not valid HTTP/1.1"),
        (CHUNKED + b"0\r\nbad trailer\r\n\r\n", 400, "Invalid header token"),
        (CHUNKED + b"1;" + b"x" * 100_000, 431, "65536 bytes"),
        (CHUNKED + b"0\r\n" + b"X: y\r\n" * 300, 431, "256 header fields"),
        (CHUNKED + b"0\r\nX: " + b"y" * 100_000, 431, "65536 bytes"),
        (HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\na", 400, "Upgrade"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "65536 bytes"),
        (GET + b"X: " + b"y" * 100_000 + b"\r\n\r\n", 431, "65536 bytes"),
        (GET + b"y" * 100_000 + b": x\r\n\r\n", 431, "65536 bytes"),
        (GET + b"X: y\r\n" * 300 + b"\r\n", 431, "256 header fields"),
        (GET + b"".join(b"X-%d: y\r\n" % i for i in range(10000)) + b"\r\n", 431, "256"),
        (GET + (b"X: " + b"y" * 1000 + b"\r\n") * 66 + b"\r\n", 431, "65536 bytes"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_malformed_requests_are_refused_in_the_same_format(
    address, monkeypatch, raw, status, message
):
    REFUSED.clear()
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    for parts in ((raw,), (raw[:7], raw[7:])):
        answer = refusal(ask(address, *parts))
        assert answer[0] == status
        assert message in answer[2] or len(parts) == 2
    assert [status for status, _ in REFUSED] == [status] * 2


def test_a_request_that_is_refused_keeps_its_id(address):
    answer = ask(address, b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\nA: b\r\nbad\r\n\r\n")
    assert b"x-request-id: mine\r\n" in answer


def test_a_head_up_to_the_limit_passes_also_after_a_large_body(address):
    first = HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000
    second = GET + (b"X: " + b"y" * 1000 + b"\r\n") * 60 + b"Connection: close\r\n\r\n"
    assert ask(address, first + second).count(b"HTTP/1.1 200 OK") == 2
    assert ask(address, GET + b"X: y\r\n" * 250 + b"Connection: close\r\n\r\n").endswith(b"/")


def test_pipelined_requests_are_answered_in_order_and_a_malformed_one_in_its_place(address):
    rows = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(2000)]
    answers = ask(address, b"".join(rows) + b"NONSENSE\r\n\r\n")
    *good, bad = answers.split(b"HTTP/1.1 ")[1:]
    assert [answer.rpartition(b"\r\n\r\n")[2] for answer in good] == [
        b"/%d" % n for n in range(2000)
    ]
    assert refusal(b"HTTP/1.1 " + bad)[0] == 400


def test_few_pipelined_requests_are_held_in_memory(address, monkeypatch):
    lengths = []
    parse = protocol.BoundedProtocol._parse

    def watched(self):
        parse(self)
        lengths.append(len(self.pipeline))

    monkeypatch.setattr(protocol.BoundedProtocol, "_parse", watched)
    row = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(address) as connection:
        connection.sendall(row * 5000)
        assert one_answer(connection).startswith(b"HTTP/1.1 200 OK")
    assert 0 < max(lengths) <= protocol._PART // len(row) + 1


@pytest.mark.parametrize("second", [b"zz\r\n", b"1\r\na", b"0\r\n\r\n"], ids=repr)
def test_the_error_of_a_malformed_body_waits_for_an_earlier_slow_response(address, second):
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = ask(address, slow + CHUNKED + second + b"zz\r\n\r\n")
    first, last = answers.split(b"HTTP/1.1 ")[1:3]
    assert first.endswith(b"/slow")
    assert last.startswith(b"200" if second.startswith(b"0") else b"400")


def test_a_malformed_chunk_ends_its_request(address):
    with connect(address) as connection:
        connection.sendall(CHUNKED + b"1\r\na\r\n")
        time.sleep(0.1)
        connection.sendall(b"zz\r\n")
        assert refusal(one_answer(connection))[:2] == (400, "invalid_http")
        assert connection.recv(10_000) == b""


@pytest.mark.parametrize("piece", [b"1\r\n \r\n", b"2000\r\n" + b" " * 8192 + b"\r\n", b" "])
def test_a_client_that_keeps_sending_after_its_response_is_disconnected(
    address, monkeypatch, piece
):
    monkeypatch.setattr(protocol, "_LINGER_S", 0.3)
    kind = b"Content-Length: 1000000000" if len(piece) == 1 else b"Transfer-Encoding: chunked"
    answer = b""
    with connect(address) as connection:
        connection.sendall(b"POST /at-once HTTP/1.1\r\nHost: x\r\n" + kind + b"\r\n\r\n" + piece)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1000):
                answer += part
        with pytest.raises(ConnectionError):
            send_until_hung_up_on(connection, piece)
    assert b"connection: close\r\n" in answer
    assert answer.endswith(b"/at-once")


def test_only_a_little_of_a_flood_is_read_after_the_response(address, monkeypatch):
    monkeypatch.setattr(protocol, "_LINGER_S", 60)
    with connect(address) as connection:
        connection.sendall(
            b"POST /at-once HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
        )
        assert one_answer(connection).endswith(b"/at-once")
        with pytest.raises(ConnectionError):
            send_until_hung_up_on(connection, b" " * (1 << 20), pause=0)


def test_a_client_that_sends_much_first_can_read_the_response(address):
    answer = ask(address, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300_000)
    assert refusal(answer)[0] == 431


def test_empty_lines_do_not_keep_a_connection_open(address, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.3)
    with connect(address) as connection:
        connection.sendall(GET + b"\r\n")
        with pytest.raises(ConnectionError):
            send_until_hung_up_on(connection, b"\r\n")


def test_a_connection_is_kept_between_requests(address):
    with connect(address) as connection:
        for body in (b"", b"a", b"abc"):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            answer = one_answer(connection)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"connection" not in answer


def test_a_client_that_expects_100_gets_it_or_a_response(address):
    with connect(address) as connection:
        expect = b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n"
        connection.sendall(HEAD + expect)
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"a")
        assert one_answer(connection).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"POST /at-once HTTP/1.1\r\nHost: x\r\n" + expect)
        answer = one_answer(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close\r\n" in answer


def test_a_request_for_another_protocol_is_answered_over_http(address):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    answer = ask(address, GET + upgrade + b"\x81\x05hello" + GET + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_too_many_connections_are_refused_in_the_same_format(address):
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(address))
        time.sleep(0.1)
        answer = ask(address, GET + b"\r\n")
        assert refusal(answer)[:2] == (503, "too_many_connections")
        assert b"retry-after: 1\r\n" in answer
    time.sleep(0.1)
    assert ask(address, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_disconnect_is_noticed_after_any_further_bytes():
    # The server stops quickly, which shows that it waits for none of the connections.
    with running(application, http=protocol.BoundedProtocol) as address:
        for rest in (b"", b"GET / HTTP/1.1\r\n\r\n", b"NONSENSE\r\n\r\n"):
            with connect(address) as connection:
                connection.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n" + rest)
                time.sleep(0.05)
        begun = time.monotonic()
    assert time.monotonic() - begun < 1.5
