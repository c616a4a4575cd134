"""`trtq inspect` and `trtq verify`: show the content of an artefact, and check it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trtq.commands.options import AsJson, Config, Timeout, Verbose, one_of
from trtq.commands.output import (
    command,
    print_line,
    print_lines,
    print_table,
    record_of,
    show,
    terminal_width,
)
from trtq.progress import ProgressPrinter

__all__ = ["inspect", "verify"]

Artefact = Annotated[
    str,
    typer.Argument(metavar="ARTEFACT", help="Run, ONNX folder, engine folder or checkpoint."),
]
VerifiedArtefact = Annotated[
    str, typer.Argument(metavar="ARTEFACT", help="Run, ONNX folder or engine folder.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="Run that the ONNX folder was exported from, to compare with."),
]
Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        autocompletion=one_of("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"),
        help="Runtime whose restrictions are checked: onnxruntime, openvino, tensorrt-rtx or "
        "tensorrt; may be repeated. Default: all.",
    ),
]
Layers = Annotated[
    bool, typer.Option("--layers", help="Compare the output of every low-bit layer; needs --run.")
]


def inspect(
    artefact: Artefact,
    config: Config = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show the layers, bits and tables of an artefact, after a check of its files.

    Example: trtq inspect run
    """
    from trtq.artefact.opened import open_artefact
    from trtq.pipelines.inspect import inspect as read_contents

    with command(verbose):
        opened = open_artefact(artefact, verify=False, config=config)
        show(read_contents(opened), as_json, lambda r: _print_contents(artefact, r))


def _print_contents(artefact: str, record: dict[str, Any]) -> None:
    from trtq.report.lines import inspect_rows

    print_lines(artefact, inspect_rows(record))
    for row in record.get("denoisers") or []:
        _print_denoiser(row)
    _print_layers(record["layers"])
    for row in record.get("engine_layers") or []:
        print_line(str(row.get("Name")))


def _print_denoiser(row: dict[str, Any]) -> None:
    """Print a recorded denoiser: its calls and its graphs with their free axes."""
    from trtq.report.texts import counts_text

    print_line(
        f"\n{row['name']} ({row['model']}): {row['calls']} calls per call of the pipeline, timestep "
        f"{row['timestep']!r}, {len(row['timesteps'] or [])} calibrated timesteps, layers "
        f"{counts_text(row['precisions'])}"
    )
    for graph in row["graphs"]:
        print_line(f"  graph {graph['folder']}: inputs {', '.join(graph['inputs'])}", fold=True)
        for name, axes in graph["free"].items():
            print_line(f"    free: {name}: {', '.join(axes)}", fold=True)
        for what, reason in graph["fixed"].items():
            print_line(f"    fixed {what}: {reason}", fold=True)


def _print_layers(rows: Sequence[dict[str, Any]]) -> None:
    """Print layers with full names, in one line each if the terminal is wide enough, else two."""
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
    notes = {reason: f"[{number}]" for number, reason in enumerate(reasons, 1)}
    cells = [(*_layer_cells(row), notes.get(row.get("reason", ""), "")) for row in rows]
    print_line(
        f"\n{len(rows)} layers: kind, bits, scale over the steps, zero points, transform, why"
    )
    widths = [max((len(texts[i]) for texts in cells), default=0) for i in range(7)]
    narrow = sum(widths) + 10 > terminal_width()
    for texts in cells:
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        if narrow:
            print_line(texts[0])
            print_line(("    " + "  ".join(padded[1:])).rstrip())
        else:
            print_line("  ".join(padded).rstrip())
    for reason, note in notes.items():
        print_line(f"{note} {reason}")


def _layer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a layer: name, kind, precision, scale, zero points and transform."""
    from trtq.evaluation.page import scale_range
    from trtq.quant import precision_text
    from trtq.report.transforms import transform_text

    weight, activation, right = (
        row.get(f"{operand}_bits") for operand in ("weight", "activation", "right")
    )
    shape = "x".join(str(side) for side in row["shape"]) if "shape" in row else ""
    points = ", ".join(str(point) for point in row.get("zero_points", []))
    return (
        row["name"],
        row.get("kind", ""),
        precision_text(weight, activation, right, row.get("format", "int")),
        scale_range(row) or shape,
        f"zero {points}" if points else "",
        transform_text(row),
    )


def verify(
    artefact: VerifiedArtefact,
    run: RunFolder = None,
    runtime: Runtimes = None,
    layers: Layers = False,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check an artefact: file hashes, runtime restrictions, and with --run parity with torch.

    Each graph is opened and called once. Exit code 1 if a check fails.

    Example: trtq verify onnx --run run --layers
    """
    from trtq.exporter.verify import verify as check
    from trtq.graph.runtimes.prepare import RUNTIMES

    with command(verbose):
        result = check(
            artefact,
            against=run,
            runtimes=runtime or RUNTIMES,
            layers=layers,
            timeout=timeout,
            progress=ProgressPrinter(),
        )
        record = record_of(result)
        show(record, as_json, lambda r: _print_checks(artefact, r))
    if not record["ok"]:
        raise typer.Exit(1)


def _print_checks(artefact: str, record: dict[str, Any]) -> None:
    graphs, runtimes = record.get("graphs", {}), record.get("runtimes", {})
    rows = {"kind": record["kind"], "files as in the manifest": str(record["files"])}
    for name, problem in graphs.items():
        rows[f"{name}, opened and called"] = "yes" if problem is None else "FAILED"
    for name, runtime in runtimes.items():
        notes = sum(not finding["fatal"] for finding in runtime["findings"])
        rows[name] = ("legal" if runtime["legal"] else "refused") + (
            f", {notes} layers in float" if notes else ""
        )
    if "parity_db_min" in record:
        rows["minimum parity"] = (
            f"{record['parity_db_min']:.1f} dB (required {record['parity_required_db']:g})"
        )
    print_lines(artefact, list(rows.items()))
    for name, problem in graphs.items():
        if problem is not None:
            print_line(f"{name}: {problem}")
    for name, runtime in runtimes.items():
        for finding in runtime["findings"]:
            print_line(f"{name}: {finding['layer']}: {finding['rule']}. {finding['fix']}")
    if record.get("layers"):
        _print_layer_parity(record)
    print_line("all well" if record["ok"] else "a check failed, see above")


def _print_layer_parity(record: dict[str, Any]) -> None:
    table = Table(title="layers compared with torch", title_justify="left")
    for column in ("layer", "dB"):
        table.add_column(column)
    for row in record["layers"]:
        table.add_row(row["name"], f"{row['snr_db']:.1f}")
    print_table(table)
    print_line(f"first layer with a flipped code: {record['first'] or 'none'}")
