"""Two replicas on Ray Serve against one process on the same processors, and replicas that are killed.

    python benchmarks/serve_ray.py ONNX [--rounds 8] [--seconds 10] [--kills 5] [--load-seconds 30]

`trtq serve` and `trtq serve --ray --replicas 2:2` run side by side and are asked by the same clients in
turns, each with more to do than it can; what is reported are the ratios of each round. Then comes steady
load on the replicas, and in the middle of it one of them is killed (SIGKILL), several times over. Each
request has an id and a seed of its own. Counted are its answers, by id, and how often it was drawn to
the end, from the replicas' logs; its picture is compared with what the one process draws for that seed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy as np
from PIL import Image
from serve import DIGITS, PATH, processor, saturate, serve_command

from trtq.artefact.manifest_file import package_versions

WORKLOAD = DIGITS | {"steps": (20,)}
CLIENTS, STEPS = 24, 50
WAIT_S = 60.0


@contextmanager
def served(onnx: Path, *options: str) -> Iterator[dict[str, Any]]:
    """A server in a process of its own; gives what it says when ready, and checks how it ends."""
    process = Popen([*serve_command(onnx), *options], stdout=PIPE, stderr=DEVNULL, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield ready | {"port": int(ready["url"].rpartition(":")[2])}
        process.send_signal(signal.SIGTERM)
        assert process.wait(2 * WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


@dataclass
class Answer:
    """What came back for one request.

    Attributes:
        seed: of the request, and part of its id.
        answers: HTTP answers on its connection that bear its id.
        status: of the first.
        png: the picture.
        sent: when, by `time.monotonic`.
        seconds: until the end of the answer.
    """

    seed: int
    answers: int
    status: int
    png: bytes
    sent: float
    seconds: float


async def ask(port: int, seed: int) -> Answer:
    """One picture; the connection is read to its end."""
    body = json.dumps({"prompt": str(seed % 10), "seed": seed, "steps": STEPS}).encode()
    name = f"serve-ray-{seed}"
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: {name}\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sent = time.monotonic()
    found = b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        found = await asyncio.wait_for(reader.read(), 4 * WAIT_S)
        writer.close()
    except (OSError, TimeoutError):
        return Answer(seed, 0, 0, b"", sent, time.monotonic() - sent)
    status = int(found.split(b" ", 2)[1]) if found.startswith(b"HTTP/1.1 ") else 0
    answers = found.lower().count(f"x-request-id: {name}\r\n".encode())
    png = b""
    if status == 200:
        # Ray's proxy sends answers in chunks; there is one picture, in one of them.
        _, _, rest = found.partition(b'"b64_json":"')
        png = base64.b64decode(rest.partition(b'"')[0])
    return Answer(seed, answers, status, png, sent, time.monotonic() - sent)


def drawn(logs: Path) -> dict[int, Counter[int]]:
    """Seeds that were drawn to the end, by process, from the replicas' logs."""
    found: dict[int, Counter[int]] = {}
    for path in logs.glob("worker-*.err"):
        lines = (line for line in path.read_text(errors="replace").splitlines() if "drawn" in line)
        events = [json.loads(line) for line in lines if line.startswith("{")]
        if events:
            process = int(path.stem.rpartition("-")[2])
            found[process] = Counter(one["seed"] for one in events if one["event"] == "drawn")
    return found


async def under_kill(port: int, logs: Path, first: int, seconds: float) -> dict[str, Any]:
    """Steady load, and in the middle of it a replica is killed; gives the answers and when that was."""
    answers: list[Answer] = []
    seeds = iter(range(first, 2**31))
    begun = time.monotonic()

    async def client() -> None:
        while time.monotonic() < begun + seconds:
            answers.append(await ask(port, next(seeds)))

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(seconds / 2)
    recent = {one.seed for one in answers if one.sent + one.seconds > time.monotonic() - 5}
    victims = [process for process, seen in drawn(logs).items() if recent & seen.keys()]
    assert len(victims) == 2, f"two replicas were to draw, there are {victims}"
    os.kill(victims[0], signal.SIGKILL)
    killed = time.monotonic()
    await asyncio.gather(*clients)
    return {"answers": answers, "killed": killed}


def largest_difference(left: bytes, right: bytes) -> int:
    """Of two pictures, in 255ths."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)), int) for png in (left, right))
    return int(abs(a - b).max())


async def drawn_by(port: int, seeds: list[int]) -> dict[int, bytes]:
    """The pictures of a server that nothing happens to."""
    found: dict[int, bytes] = {}
    left = iter(seeds)

    async def client() -> None:
        for seed in left:
            found[seed] = (await ask(port, seed)).png

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


def kill(one: int, port: int, logs: Path, first: int, seconds: float) -> dict[str, Any]:
    """One round under kill, checked against the server at port `one`."""
    run = asyncio.run(under_kill(port, logs, first, seconds))
    answers: list[Answer] = run["answers"]
    time.sleep(1)  # The logs are written.
    times = sum(drawn(logs).values(), Counter())
    reference = asyncio.run(drawn_by(one, [answer.seed for answer in answers]))
    pairs = [(a.png, reference[a.seed]) for a in answers if a.png and reference[a.seed]]
    caught = [a for a in answers if a.sent < run["killed"] < a.sent + a.seconds]
    others = [a.seconds for a in answers if a.sent + a.seconds < run["killed"]]
    return {
        "requests": len(answers),
        "under_way_at_the_kill": len(caught),
        "answered_once": sum(a.answers == 1 and a.status == 200 and bool(a.png) for a in answers),
        "statuses": dict(Counter(str(a.status) for a in answers)),
        "drawn_times": dict(sorted(Counter(str(times[a.seed]) for a in answers).items())),
        "pictures_compared": len(pairs),
        "pictures_equal": sum(left == right for left, right in pairs),
        "largest_difference": max(largest_difference(*pair) for pair in pairs),
        "slowest_seconds": max(a.seconds for a in answers),
        "slowest_before_seconds": max(others),
        "median_before_seconds": statistics.median(others),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, quartiles and both ends."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"least": min(values), "q1": q1, "median": median, "q3": q3, "most": max(values)}


def main() -> None:
    """Measure both and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--load-seconds", type=float, default=30)
    output = Path("benchmarks/results/serve_ray.json")
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    rates: dict[str, list[float]] = {"one process": [], "two replicas": []}
    onnx = arguments.onnx.resolve()
    with (
        served(onnx) as one,
        served(onnx, "--ray", "--replicas", "2:2", "--threads", "1") as two,
    ):
        servers = list(zip(rates, (one["port"], two["port"]), strict=True))
        for turn in range(arguments.rounds):
            # The one that was second is first in the next round.
            for name, port in servers[:: 1 if turn % 2 == 0 else -1]:
                found = asyncio.run(saturate(port, WORKLOAD, arguments.seconds, CLIENTS))
                rates[name].append(found)
        kills = []
        for turn in range(arguments.kills):
            first, seconds = (turn + 1) * 100_000, arguments.load_seconds
            kills.append(kill(one["port"], two["port"], Path(two["logs"]), first, seconds))
            print(json.dumps(kills[-1]), flush=True)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} threads",
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "seconds": arguments.seconds,
        "images_per_second": rates,
        "ratio_rounds": ratios,
        "ratio": quartiles(ratios),
        "clients": CLIENTS,
        "kill_steps": STEPS,
        "kill_seconds": arguments.load_seconds,
        "kills": kills,
        "packages": package_versions(),
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "packages"}, indent=2))


if __name__ == "__main__":
    main()
