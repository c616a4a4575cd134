"""Benchmarks of the server: start, overhead, and batching by step under Poisson load.

    python benchmarks/serve.py [--digits ONNX] [--shapes ONNX] [--rounds 3] [--seconds 20]

Models whose folder is not given are quantised at W4A8 and exported first. Start and overhead are
measured with digits, the smallest model, where their share is the largest. All servers run with one
thread per operator. Rows that are compared are measured in interleaved rounds, with the same arrivals
and requests.

- start: time from starting the process to the first `/readyz` with status 200.
- overhead: one request at a time over one connection, against the same number of calls of the same
  graph in this process, alternating image by image, several times with new processes; as elapsed
  time and as processor time of each process, which other work on the machine disturbs less.
- load: the capacity of a batching strategy is its throughput when the queue is never empty. Then
  requests arrive at random (Poisson) at 80 % of the smaller capacity, the same requests at the same
  times at a server that batches by step and at a server that batches whole requests of the same
  steps and guidance, as one call of a pipeline can. Both servers run at the same time, since the
  speed of a shared machine drifts, and each has about one of two cores. With `--in-turns` they run
  one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trtq.artefact.manifest_file import package_versions
from trtq.engine.open import open_engine
from trtq.processor import processor_features
from trtq.serve.models.solver import Ddim

PATH = "/v1/images/generations"
STEPS = 20
Workload = dict[str, tuple[Any, ...]]
"""Values of each request field, from which requests choose at random."""
DIGITS: Workload = {"prompt": tuple("0123456789"), "seed": tuple(range(1000))}
SHAPES: Workload = {
    "prompt": tuple(
        f"a {colour} {shape}"
        for colour in ("red", "green", "blue", "yellow")
        for shape in ("circle", "square", "triangle", "cross")
    ),
    "seed": tuple(range(1000)),
}
WORKLOADS: dict[str, dict[str, Workload]] = {
    "digits": {
        "20 steps": DIGITS | {"steps": (20,)},
        "10, 20 or 50 steps": DIGITS | {"steps": (10, 20, 50)},
        "10, 20 or 50 steps, guidance 1, 2 or 3": DIGITS
        | {"steps": (10, 20, 50), "guidance": (1, 2, 3)},
    },
    "shapes": {
        "20 steps, guidance 3": SHAPES | {"steps": (20,)},
        "10, 20 or 50 steps, guidance 1 or 3": SHAPES | {"steps": (10, 20, 50), "guidance": (1, 3)},
    },
}
Result = TypeVar("Result")
BATCHINGS = ("step", "request")
SHARE = 0.8
WARM = 20


def serve_command(onnx: Path) -> list[str]:
    """The command of a server on a free port, which it prints as JSON on its first line."""
    return [sys.executable, "-m", "trtq.cli", "serve", str(onnx), "--port", "0", "--json"]


@contextmanager
def served(onnx: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Run a server in another process, yield its port and process id, and check its exit code."""
    process = subprocess.Popen(
        [*serve_command(onnx), "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]), process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("q1", "median", "q3"), statistics.quantiles(values, n=4), strict=True))


def start_seconds(onnx: Path, provider: str, rounds: int) -> list[float]:
    """Times from starting the process to ready, in seconds."""
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        with served(onnx, "--provider", provider) as (port, _):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/readyz")
            assert connection.getresponse().status == 200
            seconds.append(time.perf_counter() - begun)
            connection.close()
    return seconds


def bare_calls(onnx: Path, provider: str) -> Callable[[], None]:
    """A function that makes the denoiser calls of one image, and nothing else."""
    engine = open_engine(onnx / "unet" / "model.onnx", provider, threads=1)
    config = json.loads((onnx / "scheduler" / "scheduler_config.json").read_text())
    sample = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)
    label = np.array([3])
    feeds = [
        {"sample": sample, "timestep": np.array([timestep], np.float32), "class_labels": label}
        for timestep in Ddim(config).timesteps(STEPS)
    ]

    def call() -> None:
        for feed in feeds:
            engine.run(feed)

    return call


def exchange(connection: socket.socket, request: bytes) -> None:
    """Send a request and read the response, at next to no cost."""
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1 << 16)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer[:300]
    left = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(connection.recv(1 << 16))


def overhead(onnx: Path, provider: str, images: int, launches: int) -> dict[str, Any]:
    """Time per image through the server and by bare calls, alternating, in seconds.

    Memory layout makes equal processes differ by some per cent, so each launch has a new server and a
    new engine.
    """
    body = json.dumps({"prompt": "3", "steps": STEPS, "seed": 0}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    launched = [_overhead_once(onnx, provider, images, request) for _ in range(launches)]
    rows = {name: [launch[name] for launch in launched] for name in launched[0]}
    return {
        "images": images,
        "overhead": statistics.median(rows["overhead"]),
        "overhead_processor": statistics.median(rows["overhead_processor"]),
        "launches": rows,
    }


def _overhead_once(onnx: Path, provider: str, images: int, request: bytes) -> dict[str, float]:
    call = bare_calls(onnx, provider)
    through: list[float] = []
    bare: list[float] = []
    bare_processor = 0.0
    with (
        served(onnx, "--provider", provider) as (port, process),
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(images + WARM):
            if turn == WARM:
                served_before = processor_seconds(process)
            begun = time.perf_counter()
            exchange(connection, request)
            between, processor_before = time.perf_counter(), time.process_time()
            call()
            end = time.perf_counter()
            if turn >= WARM:
                through.append(between - begun)
                bare.append(end - between)
                bare_processor += time.process_time() - processor_before
        served_processor = processor_seconds(process) - served_before
    return {
        "server_seconds": statistics.median(through),
        "bare_seconds": statistics.median(bare),
        "overhead": statistics.median(through) / statistics.median(bare) - 1,
        "overhead_min": min(through) / min(bare) - 1,
        "overhead_processor": served_processor / bare_processor - 1,
    }


def processor_seconds(process: int) -> float:
    """Processor time of a process, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(port: int, workload: Workload, chance: random.Random) -> float:
    """Request one image and return the latency, in seconds."""
    fields = {name: chance.choice(values) for name, values in workload.items()}
    body = json.dumps(fields).encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    return time.perf_counter() - begun


async def saturate(port: int, workload: Workload, seconds: float, clients: int) -> float:
    """Images per second while the queue is never empty."""
    lead = seconds / 4  # Not counted, since the first images are late.
    begun = time.perf_counter() + lead
    end = begun + seconds
    done = 0

    async def client(which: int) -> None:
        nonlocal done
        chance = random.Random(which)
        while time.perf_counter() < end:
            await ask(port, workload, chance)
            done += begun < time.perf_counter() < end

    await asyncio.gather(*(client(which) for which in range(clients)))
    return done / seconds


async def poisson(
    port: int, workload: Workload, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Send requests at random times, `rate` per second on average, and return their latencies."""
    chance = random.Random(seed)
    begun = time.perf_counter()
    tasks, at = [], 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, workload, chance)))
    latencies = await asyncio.gather(*tasks)
    return {
        "latencies": latencies,
        "images_per_second": len(tasks) / (time.perf_counter() - begun),
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    return float(np.quantile(values, share))


async def at_once(
    ports: dict[str, int], measure: Callable[[int], Awaitable[Result]]
) -> dict[str, Result]:
    """Measure several servers at the same time, so that a disturbance affects all of them."""
    return dict(zip(ports, await asyncio.gather(*map(measure, ports.values())), strict=True))


async def in_turns(
    ports: dict[str, int], measure: Callable[[int], Awaitable[Result]]
) -> dict[str, Result]:
    """Measure several servers one after the other, each alone on the machine."""
    return {name: await measure(port) for name, port in ports.items()}


def load(
    model: str,
    onnx: Path,
    provider: str,
    rounds: int,
    seconds: float,
    batch: int,
    only: Sequence[str],
    order: Callable[..., Any],
) -> dict[str, Any]:
    """Measure both batching strategies under each workload of a model, or under the named ones."""
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        ports = {}
        for name in BATCHINGS:
            options = ["--provider", provider, "--batching", name, "--max-batch", str(batch)]
            ports[name], _ = stack.enter_context(served(onnx, *options, "--queue", "1000"))
        if provider == "openvino":  # Wait until all sizes are compiled.
            time.sleep(30)
        for named, workload in WORKLOADS[model].items():
            if only and named not in only:
                continue
            capacities: dict[str, list[float]] = {name: [] for name in BATCHINGS}
            for _ in range(rounds):
                full = partial(saturate, workload=workload, seconds=seconds / 2, clients=3 * batch)
                for name, reached in asyncio.run(order(ports, full)).items():
                    capacities[name].append(reached)
            capacity = {name: statistics.median(values) for name, values in capacities.items()}
            rate = SHARE * min(capacity.values())
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BATCHINGS}
            for turn in range(rounds):
                arrivals = partial(
                    poisson, workload=workload, rate=rate, seconds=seconds, seed=turn
                )
                for name, run in asyncio.run(order(ports, arrivals)).items():
                    runs[name].append(run)
            rows = {name: _row(runs[name]) for name in BATCHINGS}
            ratios = {name: _ratios(runs, share) for name, share in (("p95", 0.95), ("p50", 0.5))}
            results[f"{model}, {named}"] = {
                "capacity_images_per_second": capacities,
                "capacity_ratio": capacity["step"] / capacity["request"],
                "arrivals_per_second": rate,
                "rows": rows,
                "p95_ratio": statistics.median(ratios["p95"]),
                "p95_ratio_rounds": ratios["p95"],
                "p50_ratio": statistics.median(ratios["p50"]),
            }
    return results


def _ratios(runs: dict[str, list[dict[str, Any]]], share: float) -> list[float]:
    """Ratios of the latencies by step and by request, per round with the same arrivals."""
    return [
        percentile(ours["latencies"], share) / percentile(base["latencies"], share)
        for ours, base in zip(runs["step"], runs["request"], strict=True)
    ]


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    latencies = [latency for run in runs for latency in run["latencies"]]
    return {
        "images": len(latencies),
        "p50_seconds": percentile(latencies, 0.5),
        "p95_seconds": percentile(latencies, 0.95),
        "p95_rounds": [percentile(run["latencies"], 0.95) for run in runs],
        "images_per_second": statistics.fmean(run["images_per_second"] for run in runs),
    }


def exported(model: str, folder: Path) -> Path:
    """A shipped model at W4A8, quantised and exported."""
    from trtq.exporter.export import export
    from trtq.runs.quantize import quantize

    run, onnx = folder / f"{model}-run", folder / f"{model}-onnx"
    quantize(model, {"method": "search", "bits": "w4a8", "steps": STEPS}, run)
    export(run, onnx)
    return onnx


def main() -> None:
    """Measure everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for model in WORKLOADS:
        parser.add_argument(f"--{model}", type=Path)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        help="name of a workload to measure; default: all",
    )
    parser.add_argument("--in-turns", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/serve.json"))
    arguments = parser.parse_args()
    provider, rounds, only = arguments.provider, arguments.rounds, arguments.workload
    order = in_turns if arguments.in_turns else at_once
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            model: getattr(arguments, model) or exported(model, Path(scratch))
            for model, workloads in WORKLOADS.items()
            if not only or set(only) & set(workloads)
        }
        record: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": f"{processor()}, {os.cpu_count()} threads",
            "load_before": os.getloadavg()[0],
            "provider": provider,
            "max_batch": arguments.batch,
            "seconds": arguments.seconds,
            "load_order": "one after the other" if arguments.in_turns else "both servers at once",
            "load": {},
        }
        if not only:
            digits, launches = folders["digits"], max(5, rounds)
            starts = start_seconds(digits, provider, launches)
            record |= {
                "start_seconds": {"min": min(starts), "median": statistics.median(starts)},
                "overhead": overhead(digits, provider, arguments.images, launches),
            }
        for model, folder in folders.items():
            record["load"] |= load(
                model, folder, provider, rounds, arguments.seconds, arguments.batch, only, order
            )
        record |= {"load_after": os.getloadavg()[0], "packages": package_versions()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "packages"}, indent=2))


def processor() -> str:
    """The name of the processor, if known, and the features that graphs and kernels depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = sys.platform
    return f"{name} with {', '.join(sorted(processor_features())) or 'none of our features'}"


if __name__ == "__main__":
    main()
