"""Connections that send no request, or a head without end, are hung up on; others are not."""

import contextlib
import socket
import time

import httpx
import pytest

from tests.serve.conftest import running
from trtq.serve import protocol


async def application(scope, receive, send):
    """Answers everything with 200, once the body is there."""
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address():
    with running(application, http=protocol.BoundedProtocol) as url:
        yield url


def connect(address):
    url = httpx.URL(address)
    return socket.create_connection((url.host, url.port), timeout=10)


def test_requests_pass(address):
    with httpx.Client(base_url=address) as client:
        for size in (0, 1, 200_000):
            assert client.post("/", content=b"x" * size, headers={"X": "y" * 50_000}).text == "ok"


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
            return  # It was refused while we were still sending.
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_who_says_nothing_or_stops_in_the_head_is_hung_up_on(address, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    for begin in (b"", b"GET / HTTP/1.1\r\nHost:"):
        with connect(address) as connection:
            connection.sendall(begin)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(10) == b""


def test_a_body_may_take_longer_than_a_head(address, monkeypatch):
    monkeypatch.setattr(protocol, "_HEAD_S", 0.2)
    with connect(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(0.5)
        connection.sendall(b"b")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
