"""A server under good, bad, huge, slow and cancelled requests at once: does it fail, leak or lose any?

    python benchmarks/serve_hostile.py ONNX [--minutes 10] [--schemathesis PATH_OF_st]

Clients of each kind run side by side against one `trtq serve`. Counted are the answers by status; every
request that was not hung up on must be answered once, none with 5xx. The server's resident memory after
a tenth of the time is compared with that at the end. With `--schemathesis` its own generator
joins in, on the OpenAPI schema.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve import serve_command

from trtq.manifest import package_versions

PATH = "/v1/images/generations"
LIMIT = 64 << 10
ATOMS: list[Any] = [
    None, True, -1, 0, 1, 2, 10**30, 0.5, -1e308, "", "7", "cat", "\0", "\ud800", "é" * 5000, [], {},
]  # fmt: skip
FIELDS = (
    "prompt", "model", "n", "size", "response_format", "output_format", "quality", "background",
    "user", "stream", "partial_images", "progress", "seed", "steps", "guidance", "deadline", "style",
)  # fmt: skip


class Client:
    """Counts what a server answers to raw requests."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.random = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.unanswered = 0
        self.wrong: list[str] = []

    async def send(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        until: float = 60,
        chunk: int = 0,
    ) -> bytes:
        """One request on a connection of its own; gives the answer's body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close"}
        lines |= {"Content-Length": str(len(body))} | (headers or {})
        head = f"POST {PATH} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        try:
            writer.write(head.encode() + b"\r\n")
            with suppress(ConnectionError):  # It need not read what it has refused.
                for first in range(0, len(body), chunk or max(len(body), 1)):
                    writer.write(body[first : first + (chunk or len(body))])
                    await writer.drain()
                    if chunk:
                        await asyncio.sleep(0.2)
            answer = await asyncio.wait_for(reader.read(), until)
        except ConnectionError:
            self.statuses["closed"] += 1
            return b""
        finally:
            writer.close()
        head_bytes, _, rest = answer.partition(b"\r\n\r\n")
        status = head_bytes.split(b" ")[1:2]
        if not status:
            self.unanswered += 1
            return b""
        self.statuses[status[0].decode()] += 1
        if status[0].startswith(b"5"):
            self.wrong.append(f"{answer[:200]!r} to {body[:200]!r}")
        return rest

    async def good(self) -> None:
        """Right requests; each must bring its own number of images."""
        count = self.random.randint(1, 3)
        wish = {
            "prompt": str(self.random.randrange(10)),
            "n": count,
            "steps": self.random.randint(1, 30),
            "guidance": self.random.choice([1, 3]),
            "stream": self.random.random() < 0.3,
        }
        answer = await self.send(json.dumps(wish).encode())
        found = answer.count(b'image_generation.completed"' if wish["stream"] else b'"b64_json"')
        if found != count and b"queue_full" not in answer:
            self.wrong.append(f"{found} images for {wish}: {answer[:200]!r}")

    async def bad(self) -> None:
        """JSON of the right form with wrong values, and things that are no JSON."""
        names = self.random.sample(FIELDS, self.random.randint(0, 6))
        wish = {"prompt": "1"} | {name: self.random.choice(ATOMS) for name in names}
        body = json.dumps(wish).encode()
        if self.random.random() < 0.4:
            cut = self.random.randrange(len(body))
            body = body[:cut] + self.random.randbytes(self.random.randint(0, 8)) + body[cut + 1 :]
        await self.send(body)
        await asyncio.sleep(0.02)

    async def huge(self) -> None:
        """Bodies beyond the limit, deep nesting, long numbers."""
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
        """Bodies that come in small pieces, in time or too late."""
        body = json.dumps({"prompt": "1", "steps": 2, "user": "x" * 200}).encode()
        await self.send(body, chunk=self.random.choice([2, 40, 100]))

    async def cancelled(self) -> None:
        """Clients that hang up in the middle."""
        body = json.dumps(
            {"prompt": "1", "n": 2, "steps": 100, "stream": self.random.random() < 0.5}
        )
        try:
            await self.send(body.encode(), until=self.random.uniform(0.01, 0.4))
        except TimeoutError:
            self.statuses["hung up"] += 1

    async def odd_headers(self) -> None:
        """Headers that lie or make no sense."""
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


async def until(end: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do it again and again."""
    while time.monotonic() < end:
        await work()


def resident(pid: int) -> int:
    """Bytes that a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def attack(client: Client, pid: int, seconds: float) -> list[int]:
    """All kinds of clients at once; gives the server's memory every few seconds."""
    end = time.monotonic() + seconds
    kinds = [
        client.good,
        client.bad,
        client.huge,
        client.slow,
        client.cancelled,
        client.odd_headers,
    ]
    tasks = [asyncio.create_task(until(end, kind)) for kind in kinds for _ in range(2)]
    memory = []
    while time.monotonic() < end:
        await asyncio.sleep(min(5, seconds / 10))
        memory.append(resident(pid))
    await asyncio.gather(*tasks)
    return memory


def main() -> None:
    """Run the attack and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--schemathesis", help="its command, e.g. st")
    output = Path("benchmarks/results/serve_hostile.json")
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args()
    server = subprocess.Popen(
        [*serve_command(arguments.onnx), "--queue", "16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    client = Client(int(url.rpartition(":")[2]), seed=0)
    fuzz = None
    if arguments.schemathesis:
        fuzz = subprocess.Popen(
            [arguments.schemathesis, "run", f"{url}/openapi.json", "--checks", "not_a_server_error",
             "--max-examples", "300", "--exclude-path-regex", "metrics"],
            stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(),  # It leaves notes.
        )  # fmt: skip
    memory = asyncio.run(attack(client, server.pid, 60 * arguments.minutes))
    said = fuzz.communicate()[0] if fuzz is not None else ""
    memory.append(resident(server.pid))
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    settled = memory[len(memory) // 10]
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "minutes": arguments.minutes,
        "statuses": dict(sorted(client.statuses.items())),
        "requests": client.statuses.total() + client.unanswered,
        "unanswered": client.unanswered,
        "server_errors": sum(n for s, n in client.statuses.items() if s.startswith("5")),
        "wrong": client.wrong[:20],
        "memory_settled_bytes": settled,
        "memory_last_bytes": memory[-1],
        "memory_ratio": memory[-1] / settled,
        "exit_code": code,
        "schemathesis_exit_code": None if fuzz is None else fuzz.returncode,
        "schemathesis": said.splitlines()[-25:],
        "packages": package_versions(),
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in list(record)[:10]}, indent=2))
    print(said[-3000:])


if __name__ == "__main__":
    main()
