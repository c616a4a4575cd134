"""`trtq inspect`: show the content of an artefact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from trtq.commands.early import check_model, say_loading
from trtq.commands.options import AsJson, Config, Verbose
from trtq.commands.output import command, print_line, print_lines, show, terminal_width

__all__ = ["inspect"]

Artefact = Annotated[
    str,
    typer.Argument(metavar="ARTEFACT", help="Run, ONNX folder, engine folder or checkpoint."),
]

Graphs = Annotated[
    bool,
    typer.Option("--graphs", help="Show each graph or engine by polygraphy's inspector, too."),
]


def inspect(
    artefact: Artefact,
    config: Config = None,
    graphs: Graphs = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show the layers, bits and tables of an artefact, after a check of its files.

    Example: trtq inspect run

    Example: trtq inspect onnx --graphs
    """
    with command(verbose):
        check_model(artefact, config)
        say_loading()
        from trtq.artefact.opened import open_artefact
        from trtq.pipelines.inspect import inspect as read_contents

        opened = open_artefact(artefact, verify=False, config=config)
        show(read_contents(opened, graphs=graphs), as_json, lambda r: _print_contents(artefact, r))


def _print_contents(artefact: str, record: dict[str, Any]) -> None:
    from trtq.report.lines import inspect_rows

    print_lines(artefact, inspect_rows(record))
    for row in record.get("denoisers") or []:
        _print_denoiser(row)
    _print_layers(record["layers"])
    for name, text in (record.get("graphs") or {}).items():
        print_line(f"\n{name}: {text}")
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
