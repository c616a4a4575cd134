"""`trtq serve`: serve images over HTTP, in one process or in replicas on Ray."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trtq.commands.early import check_model, say_loading
from trtq.commands.options import AsJson, Provider, Verbose, one_of, within
from trtq.commands.output import command, print_status, show
from trtq.errors import UsageError
from trtq.limits import MAX_BATCH, MAX_IMAGES, MAX_STEPS, MAX_THREADS

__all__ = ["serve"]

_DAY_S = 86_400.0

Artefact = Annotated[
    str, typer.Argument(metavar="ARTEFACT", help="ONNX folder, run or checkpoint.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen at.")]
Port = Annotated[
    int,
    typer.Option(
        "--port", callback=within(0, 65535), help="Port to listen at; 0 chooses a free port."
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Model name used in requests. Default: the folder's name."),
]
SecondModel = Annotated[
    str | None,
    typer.Option("--beside", help="Second model to serve for comparison, e.g. digits."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        callback=within(1, MAX_THREADS),
        help="Threads per operator. Default: the number of cores.",
    ),
]
MaxBatch = Annotated[
    int,
    typer.Option(
        "--max-batch",
        callback=within(2, 256),
        help="Maximum number of rows per call; an image with guidance takes two rows.",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        "--batch-sizes",
        help="Allowed numbers of rows per call, e.g. 1,2,4,8; smaller batches are padded.",
    ),
]
BatchingPolicy = Annotated[
    str,
    typer.Option(
        "--batching",
        autocompletion=one_of("step", "request"),
        help="step: images join the batch at any denoising step; request: whole batches only.",
    ),
]
QueueLength = Annotated[
    int,
    typer.Option(
        "--queue", callback=within(0, MAX_IMAGES), help="Maximum number of waiting images."
    ),
]
MaxImages = Annotated[
    int,
    typer.Option(
        "--max-images",
        callback=within(1, MAX_BATCH),
        help="Maximum number of images per request.",
    ),
]
MaxSteps = Annotated[
    int,
    typer.Option(
        "--max-steps",
        callback=within(1, MAX_STEPS),
        help="Maximum number of denoising steps per image.",
    ),
]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline-seconds",
        callback=within(0.1, _DAY_S),
        help="Time limit from request to response, in seconds.",
    ),
]
Drain = Annotated[
    float,
    typer.Option(
        "--drain-seconds",
        callback=within(0, _DAY_S),
        help="Time limit for accepted requests after SIGTERM, in seconds.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File with the API key that requests must send. Default: the variable TRTQ_API_KEY.",
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="Host name that the server answers to, in addition to localhost and its own address; "
        "'*' allows every name; may be repeated.",
    ),
]
AllowedOrigins = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-origin",
        help="Origin whose pages may send requests, e.g. http://localhost:3000; may be repeated.",
    ),
]
OnRay = Annotated[
    bool,
    typer.Option(
        "--ray", help="Serve with replicas on Ray; a running Ray is joined, else started."
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        "--replicas", help="Number of replicas with --ray, MIN:MAX, scaled by queue length."
    ),
]


def serve(
    artefact: Artefact,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    beside: SecondModel = None,
    provider: Provider = None,
    threads: Threads = None,
    max_batch: MaxBatch = 8,
    batch_sizes: BatchSizes = None,
    batching: BatchingPolicy = "step",
    queue: QueueLength = 64,
    max_images: MaxImages = 10,
    max_steps: MaxSteps = 200,
    deadline_seconds: Deadline = 120.0,
    drain_seconds: Drain = 30.0,
    api_key_file: ApiKeyFile = None,
    allowed_host: AllowedHosts = None,
    allowed_origin: AllowedOrigins = None,
    on_ray: OnRay = False,
    replicas: Replicas = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Serve images over HTTP: an OpenAI-compatible API, health, metrics, and a page to try it.

    Example: trtq serve onnx --provider openvino --beside digits
    """
    with command(verbose):
        limits = _limits(max_batch, batch_sizes, queue, max_images, max_steps, deadline_seconds)
        if replicas is not None and not on_ray:
            raise UsageError("--replicas needs --ray")
        for place in (artefact, *([] if beside is None else [beside])):
            check_model(place)
        say_loading()
        _run(
            (replicas or "1:2") if on_ray else None,
            as_json,
            verbose,
            batching,
            path=artefact,
            name=name,
            beside=beside,
            host=host,
            port=port,
            provider=provider,
            threads=threads,
            limits=limits,
            drain_s=drain_seconds,
            **_access(api_key_file, allowed_host or (), allowed_origin or ()),
        )


def _limits(
    max_batch: int, batch_sizes: str | None, queue: int, images: int, steps: int, deadline_s: float
) -> Any:
    from trtq.serve.options import Limits, parse_batch_sizes

    return Limits(
        batch=max_batch,
        batch_sizes=None if batch_sizes is None else parse_batch_sizes(batch_sizes, max_batch),
        queue=queue,
        images=images,
        steps=steps,
        deadline_s=deadline_s,
    )


def _access(
    api_key_file: Path | None, hosts: Sequence[str], origins: Sequence[str]
) -> dict[str, Any]:
    from trtq.serve.http.access import allowed_hosts, allowed_origins
    from trtq.serve.options import read_api_key

    return {
        "api_key": read_api_key(api_key_file),
        "allowed_hosts": allowed_hosts(hosts),
        "allowed_origins": allowed_origins(origins),
    }


def _run(replicas: str | None, as_json: bool, verbose: bool, batching: str, **options: Any) -> None:
    """Serve until the process is stopped: on Ray if `replicas` is given, else in this process."""
    from trtq.serve.logs import log_to
    from trtq.serve.options import ServeOptions, parse_batching
    from trtq.serve.server import serve as run_server

    options["batching"] = parse_batching(batching)
    log_to(level=logging.DEBUG if verbose else logging.INFO)
    if replicas is None:
        run_server(ServeOptions(**options), lambda record: show(record, as_json, _print_ready))
        return
    from trtq.serve.ray.local import parse_replicas, serve_on_ray
    from trtq.serve.ray.options import RayOptions

    min_replicas, max_replicas = parse_replicas(replicas)
    ray_options = RayOptions(min_replicas=min_replicas, max_replicas=max_replicas, **options)
    serve_on_ray(ray_options, lambda record: show(record, as_json, _print_ready))


def _print_ready(record: dict[str, Any]) -> None:
    names = ", ".join(record["models"])
    print_status(f"serving {names} at {record['url']}, ready in {record['seconds']} s")
