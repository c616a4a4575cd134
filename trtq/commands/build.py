"""`trtq build`: build TensorRT engines from an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trtq.commands.early import check_folder, check_graphs, say_loading
from trtq.commands.options import AsJson, Overwrite, Timeout, Verbose, one_of, output_option, within
from trtq.commands.output import command, print_lines, show
from trtq.progress import ProgressPrinter

__all__ = ["build"]

EngineFolder = Annotated[Path, output_option("Folder for the engines.")]
OnnxFolder = Annotated[str, typer.Argument(metavar="ONNX", help="ONNX folder.")]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        autocompletion=one_of("tensorrt-rtx", "tensorrt"),
        help="Engine builder: tensorrt-rtx or tensorrt. Default: the installed one.",
    ),
]
Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        help="GPU architecture, e.g. sm86; may be repeated. Default: sm86, sm89 and sm120.",
    ),
]
BatchRange = Annotated[
    str | None,
    typer.Option(
        "--batch-range",
        help="Images per call that engines accept, MIN:MAX. Default: the range of the export.",
    ),
]
WeightStreaming = Annotated[
    bool, typer.Option("--weight-streaming", help="Allow weights to stay in host memory.")
]
Refit = Annotated[
    bool, typer.Option("--refit", help="Make weights exchangeable after the build; needs a GPU.")
]
Workspace = Annotated[
    int | None,
    typer.Option(
        "--workspace", callback=within(1, 1 << 20), help="Builder workspace limit, in MiB."
    ),
]
Fuse = Annotated[
    bool,
    typer.Option(
        "--fuse/--no-fuse",
        help="Let trtq's plugins also compute norms, activations and residuals around their layers, in "
        "engines of TensorRT-RTX.",
    ),
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Reuse engines from the cache of earlier builds.")
]


def build(
    onnx: OnnxFolder,
    output: EngineFolder,
    backend: Backend = None,
    arch: Architectures = None,
    batch_range: BatchRange = None,
    weight_streaming: WeightStreaming = False,
    refit: Refit = False,
    workspace: Workspace = None,
    fuse: Fuse = True,
    cache: Cache = True,
    timeout: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Build TensorRT engines of an ONNX folder; TensorRT-RTX needs no GPU for it.

    Example: trtq build onnx -o engine --arch sm86 --arch sm89
    """
    with command(verbose):
        check_folder(output, onnx, "engine", overwrite=overwrite)
        check_graphs(onnx)
        say_loading()
        from trtq.exporter.build import build as build_engines
        from trtq.exporter.export import parse_batch

        result = build_engines(
            onnx,
            output,
            backend=backend,
            architectures=arch or [],
            batch=None if batch_range is None else parse_batch(batch_range),
            weight_streaming=weight_streaming,
            refit=refit,
            workspace_bytes=None if workspace is None else workspace << 20,
            fuse=fuse,
            use_cache=cache,
            timeout=timeout,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        show(result, as_json, lambda r: _print_engines(f"engine: {output}", r))


def _print_engines(title: str, record: dict[str, Any]) -> None:
    from trtq.report.lines import bytes_text, seconds_text

    header = (
        "engine",
        "size",
        "layers",
        "low-bit layers",
        "in float",
        "built in",
        "from the cache",
    )
    rows = [
        (
            str(row["name"]),
            bytes_text(row["engine_bytes"]),
            "-" if row["layers"] is None else str(row["layers"]),
            ", ".join(f"{count} {name}" for name, count in row["precisions"].items()) or "-",
            "-" if row["float"] is None else str(row["float"]),
            seconds_text(row["build_seconds"]),
            "yes" if row["cached"] else "no",
        )
        for row in record["engines"]
    ]
    print_lines(title, rows, header)
