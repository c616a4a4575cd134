"""`trtq package triton`: write a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trtq.commands.early import check_folder, check_graphs, check_packaged, say_loading
from trtq.commands.options import AsJson, Overwrite, Timeout, Verbose, output_option
from trtq.commands.output import command, print_line, print_table, show
from trtq.progress import ProgressPrinter

__all__ = ["package_triton"]

Repository = Annotated[Path, output_option("Folder for the model repository.")]
GraphFolder = Annotated[
    str, typer.Argument(metavar="ARTEFACT", help="ONNX folder or engine folder.")
]
RecordedOnnx = Annotated[
    Path | None,
    typer.Option(
        "--onnx", help="ONNX folder that the engines were built from. Default: the recorded path."
    ),
]


def package_triton(
    artefact: GraphFolder,
    output: Repository,
    onnx: RecordedOnnx = None,
    timeout: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a model repository for Triton Inference Server: one model per graph, one for the pipeline.

    Example: trtq package triton onnx -o model_repository
    """
    with command(verbose):
        check_packaged(artefact)
        if onnx is not None:
            check_graphs(onnx)
        check_folder(output, artefact, "triton", overwrite=overwrite)
        say_loading()
        from trtq.serve.triton.package import package_triton as write_repository

        result = write_repository(
            artefact,
            output,
            onnx=onnx,
            timeout=timeout,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        show(result, as_json, lambda r: _print_repository(f"model repository: {output}", r))


def _print_repository(title: str, record: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    keys = ("backend", "max_batch_size")
    for column in ("model", *keys, "files"):
        table.add_column(column)
    for name, row in record["models"].items():
        table.add_row(name, *(str(row[key]) for key in keys), str(len(row["files"])))
    print_table(table)
    for note in record["notes"]:
        print_line(f"note: {note}")
