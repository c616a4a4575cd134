"""Two replicas on Ray Serve against one process on the same processors, and a replica that is killed.

    python benchmarks/serve_ray.py ONNX [--rounds 3] [--seconds 10]

Both are asked by the same clients in turns, each with more to do than it can. Then one of the replicas
is killed (SIGKILL) while 40 requests are under way; counted is how many of them were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve import DIGITS, ask, processor, saturate, serve_command

from trtq.manifest import package_versions
from trtq.serve.ray import RayOptions, app

WORKLOAD = DIGITS | {"steps": (20,)}
LONG = DIGITS | {"steps": (100,)}
CLIENTS, KILLED_UNDER = 24, 40
PORT = 8199


def start_ray(onnx: Path) -> Any:
    """Two replicas behind a port; gives the handle of the replicas."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = RayOptions(path=str(onnx.resolve()), min_replicas=2, max_replicas=2)
    serve.run(app(options), name="trtq", route_prefix="/")
    return serve.get_deployment_handle("Replica", app_name="trtq")


async def under_kill(replicas: Any) -> dict[str, int]:
    """How many of the requests under way are answered when a replica is killed."""
    victim = await replicas.process.remote()
    tasks = [
        asyncio.create_task(ask(PORT, LONG, random.Random(which))) for which in range(KILLED_UNDER)
    ]
    await asyncio.sleep(1)
    os.kill(victim, signal.SIGKILL)
    before = sum(task.done() for task in tasks)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    answered = sum(isinstance(one, float) for one in found)
    return {"requests": KILLED_UNDER, "answered_before": before, "answered": answered}


def main() -> None:
    """Measure both and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    output = Path("benchmarks/results/serve_ray.json")
    parser.add_argument("-o", "--output", type=Path, default=output)
    arguments = parser.parse_args()
    command = serve_command(arguments.onnx)
    alone = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert alone.stdout is not None
    port = int(json.loads(alone.stdout.readline())["url"].rpartition(":")[2])
    replicas = start_ray(arguments.onnx)
    reached: dict[str, list[float]] = {"one process": [], "two replicas": []}
    before = os.getloadavg()[0]
    for _ in range(arguments.rounds):
        for name, where in (("one process", port), ("two replicas", PORT)):
            rate = asyncio.run(saturate(where, WORKLOAD, arguments.seconds, CLIENTS))
            reached[name].append(rate)
    alone.send_signal(signal.SIGTERM)
    code = alone.wait(60)
    time.sleep(1)
    killed = asyncio.run(under_kill(replicas))
    medians = {name: statistics.median(values) for name, values in reached.items()}
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} threads",
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "images_per_second": reached,
        "ratio": medians["two replicas"] / medians["one process"],
        "killed": killed,
        "exit_code": code,
        "packages": package_versions(),
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "packages"}, indent=2))


if __name__ == "__main__":
    main()
