"""A server under valid, invalid, huge, slow and cancelled requests: does it fail, leak or lose any?

    python benchmarks/serve_hostile.py ONNX [--minutes 10] [--schemathesis PATH_OF_st]

Clients of each kind run at the same time against one `trtq serve`. One kind asks for more images
than the queue has room for, one sends bodies that never end and goes on sending after the response.
The script counts responses by status, in total and by kind. Every request whose client stays
connected must get one response, none with 5xx, and the server's `/metrics` must show no internal
error and no image in progress. For resident memory and open files, the median of the samples between
10 % and 30 % of the time is compared with the median of the last 20 %. With `--schemathesis` its
generator for OpenAPI schemas joins in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve import processor, serve_command

from trtq.artefact.manifest_file import package_versions

PATH = "/v1/images/generations"
LIMIT = 64 << 10
PATIENCE_S = 60.0
MAX_UNDER_WAY = 24
"""Maximum number of images in progress: 8 in a call and 16 that wait."""
OPEN_S = 15.0
"""Time after its response by which a connection must be closed, in seconds."""
KIND = ContextVar("kind", default="")
FOREIGN_HOSTS = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "8.8.8.8", "[2001:db8::1]", "0.0.0.0",
    "user@localhost", "localhost:99999", "", "localhost, evil.example", "a" * 300,
)  # fmt: skip
FOREIGN_ORIGINS: tuple[dict[str, str], ...] = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "https://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"},
)
NO_REQUESTS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n",
    b"BREW / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: \0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
)  # fmt: skip
ENDLESS = (
    (b"Transfer-Encoding: chunked", b"1\r\n \r\n", 0.5),
    (b"Transfer-Encoding: chunked", b"2000\r\n" + b" " * 8192 + b"\r\n", 0.01),
    (b"Transfer-Encoding: chunked", b"1;" + b"x" * 100 + b"\r\n \r\n", 0.1),
    (b"Content-Length: 1000000000000", b" " * 8192, 0.01),
    (b"Content-Length: 1000000000000", b" ", 0.5),
)
ATOMS: list[Any] = [
    None, True, -1, 0, 1, 2, 10**30, 0.5, -1e308, "", "7", "cat", "\0", "\ud800", "é" * 5000, [], {},
]  # fmt: skip
FIELDS = (
    "prompt", "model", "n", "size", "response_format", "output_format", "quality", "background",
    "user", "stream", "partial_images", "progress", "seed", "steps", "guidance", "deadline", "style",
)  # fmt: skip


class Client:
    """Sends raw requests and counts the responses."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.random = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.still_open: list[str] = []
        self.open_s: list[float] = []
        self.cut_off: Counter[str] = Counter()
        self.unanswered: list[str] = []
        self.wrong: list[str] = []

    async def send(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        until: float = PATIENCE_S,
        chunk: int = 0,
    ) -> bytes:
        """Send a request on a new connection and return the whole response."""
        lines = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close"}
        lines |= {"Content-Length": str(len(body))} | (headers or {})
        head = f"POST {PATH} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        return await self.raw(head.encode() + b"\r\n", body, until=until, chunk=chunk)

    async def raw(
        self, head: bytes, body: bytes = b"", *, until: float = PATIENCE_S, chunk: int = 0
    ) -> bytes:
        """Send a request whose head is these bytes, and return the whole response."""
        with socket.socket() as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            try:
                async with asyncio.timeout(until):
                    stopped = await _send_all(connection, head, body, chunk)
                    answer, reset = await _read_all(connection)
            except TimeoutError:
                if until < PATIENCE_S:
                    raise  # The caller wanted to close the connection early.
                stopped, answer, reset = f"nothing in {until:g} s", b"", ""
        status = answer.partition(b"\r\n")[0].split(b" ")[1:2]
        request = f"{KIND.get()}: {head[:200]!r} {len(body)} bytes {body[:100]!r}"
        if not status:
            self.unanswered.append(f"{stopped or reset or 'closed'}: {request}")
            return b""
        self.count(status[0].decode())
        # The response arrived; count connections that ended before it was read completely.
        if stopped or reset:
            self.cut_off[f"{status[0].decode()}: {stopped or reset}"] += 1
        if not _is_whole(answer):
            self.wrong.append(f"cut short: {answer[:200]!r} to {request}")
        if status[0].startswith(b"5"):
            self.wrong.append(f"{answer[:200]!r} to {request}")
        return answer

    def count(self, status: str) -> None:
        """Count a response by its status."""
        self.statuses[status] += 1
        self.kinds[KIND.get()][status] += 1

    def refused(self, answer: bytes, *statuses: int) -> None:
        """Check that a response has one of these statuses, OpenAI's format and a request id."""
        head, _, body = answer.partition(b"\r\n\r\n")
        right = any(answer.startswith(b"HTTP/1.1 %d " % status) for status in statuses)
        if answer and not (right and b"x-request-id: " in head.lower() and b'{"error"' in body):
            self.wrong.append(f"{KIND.get()}: no clear refusal: {answer[:200]!r}")

    async def foreign_hosts(self) -> None:
        """Send host names that a page could let resolve to this server."""
        host = self.random.choice(FOREIGN_HOSTS)
        self.refused(await self.send(b'{"prompt": "1"}', {"Host": host}), 400, 421)
        await asyncio.sleep(0.02)

    async def foreign_origins(self) -> None:
        """Send what a browser sends for a page of another site."""
        headers = self.random.choice(FOREIGN_ORIGINS)
        self.refused(await self.send(b'{"prompt": "1"}', headers), 403)
        await asyncio.sleep(0.02)

    async def no_requests(self) -> None:
        """Send bytes that the parser cannot read."""
        self.refused(await self.raw(self.random.choice(NO_REQUESTS)), 400, 405, 431)
        await asyncio.sleep(0.02)

    async def endless(self) -> None:
        """Send a body that never ends; the connection must not stay open after the response."""
        how, piece, pause = self.random.choice(ENDLESS)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            answering = asyncio.create_task(_read_all(connection))
            answered, end = None, time.monotonic() + PATIENCE_S
            try:
                await loop.sock_sendall(connection, head.encode() + how + b"\r\n\r\n")
                while time.monotonic() < end:
                    await asyncio.wait_for(loop.sock_sendall(connection, piece), OPEN_S)
                    await asyncio.sleep(pause)
                    if answered is None and answering.done():
                        answered = time.monotonic()
                        end = answered + OPEN_S
                else:
                    self.still_open.append(
                        f"{how!r} {piece[:20]!r}, answered {answered is not None}"
                    )
            except (ConnectionError, TimeoutError):
                pass
            if answered is not None:
                self.open_s.append(round(time.monotonic() - answered, 2))
            answer, _ = await answering
        if answer:
            self.count(answer.split(b" ", 2)[1].decode())
            self.refused(answer, 408, 413)
        else:
            self.count("reset before it was read")

    async def good(self) -> None:
        """Send valid requests; each must return its number of images."""
        count = self.random.randint(1, 3)
        fields = {
            "prompt": str(self.random.randrange(10)),
            "n": count,
            "steps": self.random.randint(1, 30),
            "guidance": self.random.choice([1, 3]),
            "stream": self.random.random() < 0.3,
        }
        answer = await self.send(json.dumps(fields).encode())
        images = answer.count(b'image_generation.completed"' if fields["stream"] else b'"b64_json"')
        if images != count and b"queue_full" not in answer:
            self.wrong.append(f"{images} images for {fields}: {answer[:200]!r}")

    async def crowd(self) -> None:
        """Ask for more images than the queue has room for; a request gets all images or a 429."""
        wishes = [
            {"prompt": "4", "n": 10, "steps": self.random.randint(5, 15)}
            for _ in range(MAX_UNDER_WAY // 10 + 2)
        ]
        answers = await asyncio.gather(*(self.send(json.dumps(wish).encode()) for wish in wishes))
        for answer in answers:
            drawn = answer.count(b'"b64_json"') == 10
            refused = b"queue_full" in answer and b"\r\nretry-after: " in answer.lower()
            if drawn == refused:
                self.wrong.append(f"neither ten images nor a clear 429: {answer[:200]!r}")
        await asyncio.sleep(3)

    async def bad(self) -> None:
        """Send JSON with invalid values, and malformed JSON."""
        names = self.random.sample(FIELDS, self.random.randint(0, 6))
        fields = {"prompt": "1"} | {name: self.random.choice(ATOMS) for name in names}
        body = json.dumps(fields).encode()
        if self.random.random() < 0.4:
            cut = self.random.randrange(len(body))
            body = body[:cut] + self.random.randbytes(self.random.randint(0, 8)) + body[cut + 1 :]
        await self.send(body)
        await asyncio.sleep(0.02)

    async def huge(self) -> None:
        """Send bodies beyond the limit, deep nesting, long numbers."""
        body = self.random.choice(
            [
                b'{"prompt": "' + b"x" * (4 * LIMIT) + b'"}',
                b"[" * (LIMIT - 1),
                b'{"prompt": "1", "seed": ' + b"9" * (LIMIT // 2) + b"}",
                b'{"prompt": "1", "n": 1e999999}',
            ]
        )
        await self.send(body)
        await asyncio.sleep(0.1)

    async def slow(self) -> None:
        """Send bodies in small pieces, in time or too late."""
        body = json.dumps({"prompt": "1", "steps": 2, "user": "x" * 200}).encode()
        await self.send(body, chunk=self.random.choice([2, 40, 100]))

    async def cancelled(self) -> None:
        """Close the connection during the request."""
        body = json.dumps(
            {"prompt": "1", "n": 2, "steps": 100, "stream": self.random.random() < 0.5}
        )
        try:
            await self.send(body.encode(), until=self.random.uniform(0.01, 0.4))
        except TimeoutError:
            self.count("hung up")

    async def odd_headers(self) -> None:
        """Send headers that are wrong or make no sense."""
        headers = self.random.choice(
            [
                {"Content-Type": "text/plain"},
                {"X-Request-ID": "x" * 5000},
                {"Authorization": "Bearer \xe9"},
                {"Content-Encoding": "gzip"},
                {"Transfer-Encoding": "chunked", "Content-Length": "2"},
            ]
        )
        await self.send(b"{}", headers)
        await asyncio.sleep(0.05)


async def _send_all(connection: socket.socket, head: bytes, body: bytes, chunk: int) -> str:
    """Send a request, in pieces of `chunk` bytes if that is not 0, and return the error, if any."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, head)
        for first in range(0, len(body), chunk or max(len(body), 1)):
            await loop.sock_sendall(connection, body[first : first + (chunk or len(body))])
            if chunk:
                await asyncio.sleep(0.2)
    except ConnectionError as error:  # The server need not read a request that it has refused.
        return f"{type(error).__name__} while sending"
    return ""


async def _read_all(connection: socket.socket) -> tuple[bytes, str]:
    """The bytes up to the end of the connection, and the error that ended it, if any."""
    answer = b""
    loop = asyncio.get_running_loop()
    try:
        while part := await loop.sock_recv(connection, 1 << 16):
            answer += part
    except ConnectionError as error:
        return answer, f"{type(error).__name__} while reading"
    return answer, ""


def _is_whole(answer: bytes) -> bool:
    """Whether a response is complete, by its length or its last chunk."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if b"content-length" in lines:
        return len(body) == int(lines[b"content-length"])
    return b"transfer-encoding" not in lines or body.endswith(b"0\r\n\r\n")


async def until(end: float, work: Callable[[], Awaitable[None]]) -> None:
    """Repeat `work` until a time of `time.monotonic`."""
    KIND.set(work.__name__)
    while time.monotonic() < end:
        await work()


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """Number of open files and connections of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def sockets(pid: int) -> int:
    """Number of open sockets of a process."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # The file was closed meanwhile.
            count += os.readlink(path).startswith("socket:")
    return count


async def attack(client: Client, pid: int, seconds: float) -> dict[str, list[int]]:
    """Run all kinds of clients, and sample the server's memory and open files."""
    end = time.monotonic() + seconds
    kinds = [
        client.good,
        client.bad,
        client.huge,
        client.slow,
        client.cancelled,
        client.odd_headers,
        client.foreign_hosts,
        client.foreign_origins,
        client.no_requests,
        client.endless,
    ]
    tasks = [asyncio.create_task(until(end, kind)) for kind in kinds for _ in range(2)]
    tasks.append(asyncio.create_task(until(end, client.crowd)))
    samples: dict[str, list[int]] = {"memory_bytes": [], "open_files": []}
    while time.monotonic() < end:
        await asyncio.sleep(min(5, seconds / 50))
        samples["memory_bytes"].append(resident(pid))
        samples["open_files"].append(open_files(pid))
    await asyncio.gather(*tasks)
    return samples


def flatness(samples: list[int]) -> dict[str, float]:
    """Medians after the start and at the end."""
    count = len(samples)
    settled = statistics.median(samples[count // 10 : 3 * count // 10])
    last = statistics.median(samples[-(count // 5) :])
    return {"settled": settled, "last": last, "max": max(samples), "ratio": last / settled}


def server_counts(url: str) -> dict[str, float]:
    """Counters of the server: errors, responses with 5xx, images in progress."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines[::-1])
              if key.startswith("trtq_")}  # fmt: skip
    return {
        "internal_errors": sum(v for k, v in values.items() if 'code="internal_error"' in k),
        "engine_errors": sum(v for k, v in values.items() if 'code="engine_error"' in k),
        "answers_of_5xx": sum(
            v for k, v in values.items() if "request_seconds_count" in k and 'status="5' in k
        ),
        "images_under_way": sum(v for k, v in values.items() if "images_under_way" in k),
        "images_drawn": sum(v for k, v in values.items() if k.startswith("trtq_images_total")),
    }


def started(onnx: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server; returns its process and its URL."""
    server = subprocess.Popen(
        [*serve_command(onnx), "--queue", str(MAX_UNDER_WAY - 8)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())["url"]


def main() -> None:
    """Run the attack and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--schemathesis", help="command of schemathesis, e.g. st")
    output = Path("benchmarks/results/serve_hostile.json")
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args()
    server, url = started(arguments.onnx)
    sockets_before = sockets(server.pid)
    client = Client(int(url.rpartition(":")[2]), seed=0)
    fuzz = None
    if arguments.schemathesis:
        fuzz = subprocess.Popen(
            [arguments.schemathesis, "run", f"{url}/openapi.json", "--checks", "not_a_server_error",
             "--max-examples", "300", "--exclude-path-regex", "metrics"],
            stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(),  # It writes files.
        )  # fmt: skip
    samples = asyncio.run(attack(client, server.pid, 60 * arguments.minutes))
    fuzz_output = fuzz.communicate()[0] if fuzz is not None else ""
    time.sleep(OPEN_S)
    connections = sockets(server.pid) - sockets_before
    counted = server_counts(url)
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} threads",
        "minutes": arguments.minutes,
        "statuses": dict(sorted(client.statuses.items())),
        "kinds": {kind: dict(sorted(seen.items())) for kind, seen in sorted(client.kinds.items())},
        "endless_bodies": {
            "open_15_s_after_the_answer": len(client.still_open),
            "examples": client.still_open[:20],
            "longest_open_after_the_answer_s": max(client.open_s, default=0.0),
        },
        "connections_open_at_the_end": connections,
        "requests": client.statuses.total() + len(client.unanswered),
        "cut_off_after_the_answer": dict(sorted(client.cut_off.items())),
        "unanswered": len(client.unanswered),
        "unanswered_examples": client.unanswered[:20],
        "server_errors": sum(n for s, n in client.statuses.items() if s.startswith("5")),
        "wrong": len(client.wrong),
        "wrong_examples": client.wrong[:20],
        "counted_by_the_server": counted,
        "memory_bytes": flatness(samples["memory_bytes"]),
        "open_files": flatness(samples["open_files"]),
        "samples": len(samples["memory_bytes"]),
        "exit_code": code,
        "schemathesis_exit_code": None if fuzz is None else fuzz.returncode,
        "schemathesis": fuzz_output.splitlines()[-25:],
        "packages": package_versions(),
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in list(record)[:-3]}, indent=2))
    print(fuzz_output[-3000:])


if __name__ == "__main__":
    main()
