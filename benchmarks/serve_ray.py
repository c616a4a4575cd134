"""Two replicas on Ray Serve compared with one process on the same processors, and killed replicas.

    python benchmarks/serve_ray.py ONNX [--rounds 8] [--seconds 10] [--kills 5] [--load-seconds 30]

`trtq serve` and `trtq serve --ray --replicas 2:2` run at the same time. The same clients saturate
them in interleaved rounds, and the result is the ratio of each round. Then the replicas are under
steady load, in the middle of which one replica is killed (SIGKILL), several times over. Each request
has its own id and seed. The script counts the responses of a request by id, and how often it was
drawn completely by the replicas' logs, and compares its image with the image that the one process
draws for that seed.
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
    """Run a server in another process, yield its announcement, and check its exit code."""
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
    """The response to one request.

    Attributes:
        seed: seed of the request, and part of its id.
        answers: number of HTTP responses on the connection with the request's id.
        status: status of the first response.
        png: the image.
        sent: `time.monotonic()` at which the request was sent.
        seconds: time until the end of the response.
    """

    seed: int
    answers: int
    status: int
    png: bytes
    sent: float
    seconds: float


async def ask(port: int, seed: int) -> Answer:
    """Request one image and read the connection to its end."""
    body = json.dumps({"prompt": str(seed % 10), "seed": seed, "steps": STEPS}).encode()
    name = f"serve-ray-{seed}"
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: {name}\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sent = time.monotonic()
    raw = b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        raw = await asyncio.wait_for(reader.read(), 4 * WAIT_S)
        writer.close()
    except (OSError, TimeoutError):
        return Answer(seed, 0, 0, b"", sent, time.monotonic() - sent)
    status = int(raw.split(b" ", 2)[1]) if raw.startswith(b"HTTP/1.1 ") else 0
    answers = raw.lower().count(f"x-request-id: {name}\r\n".encode())
    png = b""
    if status == 200:
        # Ray's proxy sends responses in chunks, one of which holds the image.
        _, _, rest = raw.partition(b'"b64_json":"')
        png = base64.b64decode(rest.partition(b'"')[0])
    return Answer(seed, answers, status, png, sent, time.monotonic() - sent)


def drawn(logs: Path) -> dict[int, Counter[int]]:
    """Seeds that were drawn completely, by process, from the replicas' logs."""
    seeds: dict[int, Counter[int]] = {}
    for path in logs.glob("worker-*.err"):
        lines = (line for line in path.read_text(errors="replace").splitlines() if "drawn" in line)
        events = [json.loads(line) for line in lines if line.startswith("{")]
        if events:
            process = int(path.stem.rpartition("-")[2])
            seeds[process] = Counter(event["seed"] for event in events if event["event"] == "drawn")
    return seeds


async def under_kill(port: int, logs: Path, first: int, seconds: float) -> dict[str, Any]:
    """Kill a replica under steady load; returns the responses and the time of the kill."""
    answers: list[Answer] = []
    seeds = iter(range(first, 2**31))
    begun = time.monotonic()

    async def client() -> None:
        while time.monotonic() < begun + seconds:
            answers.append(await ask(port, next(seeds)))

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(seconds / 2)
    recent = {
        answer.seed for answer in answers if answer.sent + answer.seconds > time.monotonic() - 5
    }
    victims = [process for process, seen in drawn(logs).items() if recent & seen.keys()]
    assert len(victims) == 2, f"expected two replicas, got {victims}"
    os.kill(victims[0], signal.SIGKILL)
    killed = time.monotonic()
    await asyncio.gather(*clients)
    return {"answers": answers, "killed": killed}


def largest_difference(left: bytes, right: bytes) -> int:
    """Maximum difference of two images, in levels of 255."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)), int) for png in (left, right))
    return int(abs(a - b).max())


async def drawn_by(port: int, seeds: list[int]) -> dict[int, bytes]:
    """The images of a server that is not disturbed."""
    pngs: dict[int, bytes] = {}
    left = iter(seeds)

    async def client() -> None:
        for seed in left:
            pngs[seed] = (await ask(port, seed)).png

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return pngs


def kill(reference_port: int, port: int, logs: Path, first: int, seconds: float) -> dict[str, Any]:
    """One round with a kill, checked against the server at `reference_port`."""
    run = asyncio.run(under_kill(port, logs, first, seconds))
    answers: list[Answer] = run["answers"]
    time.sleep(1)  # The logs are written.
    times = sum(drawn(logs).values(), Counter())
    reference = asyncio.run(drawn_by(reference_port, [answer.seed for answer in answers]))
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
    """Median, quartiles, minimum and maximum."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "max": max(values)}


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
        served(onnx) as single,
        served(onnx, "--ray", "--replicas", "2:2", "--threads", "1") as replicas,
    ):
        servers = list(zip(rates, (single["port"], replicas["port"]), strict=True))
        for turn in range(arguments.rounds):
            # The order alternates from round to round.
            for name, port in servers[:: 1 if turn % 2 == 0 else -1]:
                rate = asyncio.run(saturate(port, WORKLOAD, arguments.seconds, CLIENTS))
                rates[name].append(rate)
        kills = []
        for turn in range(arguments.kills):
            first, seconds = (turn + 1) * 100_000, arguments.load_seconds
            kills.append(
                kill(single["port"], replicas["port"], Path(replicas["logs"]), first, seconds)
            )
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
