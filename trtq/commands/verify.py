"""`trtq verify`: check an artefact, and compare it with another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trtq.commands.early import check_artefact, check_model, say_loading
from trtq.commands.options import PROVIDERS, AsJson, Overwrite, Timeout, Verbose, one_of
from trtq.commands.output import (
    command,
    folding_table,
    print_line,
    print_lines,
    print_table,
    record_of,
    show,
)
from trtq.errors import UsageError
from trtq.progress import ProgressPrinter

__all__ = ["verify"]

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
    bool,
    typer.Option(
        "--layers", help="Compare the output of every low-bit layer; needs --run or --against."
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="OTHER",
        help="Checkpoint, run, ONNX folder or engines to compare with at every step, by polygraphy.",
    ),
]
SideProvider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        autocompletion=one_of(*PROVIDERS),
        help="With --against: what runs ARTEFACT; cpu (default), openvino or cuda for ONNX folders.",
    ),
]
AgainstProvider = Annotated[
    str | None,
    typer.Option(
        "--against-provider",
        autocompletion=one_of(*PROVIDERS),
        help="With --against: what runs OTHER.",
    ),
]
Bisect = Annotated[
    bool,
    typer.Option(
        "--bisect",
        help="With --against: find the low-bit layers that repair the output in float, by halving.",
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="FOLDER",
        help="With --against: folder for inputs, outputs and verdicts in polygraphy's JSON.",
    ),
]
Script = Annotated[
    Path | None,
    typer.Option(
        "--script",
        metavar="FOLDER",
        help="With --against: folder for the same, the graph, and a command of polygraphy that repeats "
        "the comparison without trtq.",
    ),
]


def verify(
    artefact: VerifiedArtefact,
    run: RunFolder = None,
    against: Against = None,
    provider: SideProvider = None,
    against_provider: AgainstProvider = None,
    runtime: Runtimes = None,
    layers: Layers = False,
    bisect: Bisect = False,
    results: Results = None,
    script: Script = None,
    timeout: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check an artefact: file hashes, runtime restrictions, and with --run parity with torch.

    Each graph is opened and called once. With --against, two artefacts are compared at every denoising
    step instead, by polygraphy; of a pipeline quantised with --call, in every call of its denoisers.
    Exit code 1 if a check fails.

    Example: trtq verify onnx --run run --layers

    Example: trtq verify onnx --provider openvino --against run --layers
    """
    with command(verbose):
        if against is not None:
            _refuse({"--run": run, "--runtime": runtime}, "does not go with --against")
            check_model(artefact)
            check_model(against)
            say_loading()
            from trtq.comparison.compare import compare

            result: Any = compare(
                artefact,
                against,
                provider=provider,
                against_provider=against_provider,
                layers=layers,
                bisect=bisect,
                results=results,
                script=script,
                overwrite=overwrite,
                progress=ProgressPrinter(),
            )
            record = record_of(result)
            show(record, as_json, _print_comparison)
        else:
            given: dict[str, Any] = {"--provider": provider, "--bisect": bisect}
            given |= {"--against-provider": against_provider}
            given |= {"--results": results, "--script": script}
            _refuse(given, "needs --against OTHER")
            check_artefact(artefact)
            say_loading()
            record = _check(artefact, run, runtime, layers, timeout)
            show(record, as_json, lambda r: _print_checks(artefact, r))
    if not record["ok"]:
        raise typer.Exit(1)


def _check(
    artefact: str, run: Path | None, runtime: list[str] | None, layers: bool, timeout: float
) -> dict[str, Any]:
    from trtq.exporter.verify import verify as check
    from trtq.graph.runtimes.prepare import RUNTIMES

    result = check(
        artefact,
        against=run,
        runtimes=runtime or RUNTIMES,
        layers=layers,
        timeout=timeout,
        progress=ProgressPrinter(),
    )
    return record_of(result)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise if an option is given.

    Raises:
        UsageError: the first option that is given.
    """
    for name, value in options.items():
        if value:
            raise UsageError(f"{name} {why}")


def _print_comparison(record: dict[str, Any]) -> None:
    title = f"{record['other']} against {record['reference']}"
    rows = [
        (
            *_denoiser(row),
            row["output"],
            "mixed" if row["timestep"] is None else f"{row['timestep']:g}",
            f"{row['snr_db']:.1f}",
            f"{row['required_db']:.1f}",
            f"{row['ties']:.0%}" if row["ties"] else "",
            "" if row["ok"] else "FAILED",
        )
        for row in record["calls"]
    ]
    header = (
        *_denoiser(record["calls"][0], "denoiser"),
        *("output", "timestep", "dB", "required", "set aside", ""),
    )
    print_table(folding_table(title, header, rows))
    if record.get("layers"):
        _print_compared_layers(record)
    if record.get("bisection"):
        _print_bisection(record["bisection"])
    if record.get("folder"):
        print_line(f"written to {record['folder']}: {', '.join(record['files'])}")
    if record.get("command"):
        print_line(f"without trtq: cd {record['folder']} && {record['command']}")
    print_line("all well" if record["ok"] else "an output leaves its bound, see above")


def _denoiser(row: dict[str, Any], title: str | None = None) -> tuple[str, ...]:
    """The cell of a row's denoiser, or the title of its column; empty if it has no name."""
    name = row.get("denoiser")
    return () if name is None else (title or str(name),)


def _print_compared_layers(record: dict[str, Any]) -> None:
    rows = [
        (
            *_denoiser(row),
            row["name"],
            f"{row['snr_db']:.1f}",
            f"{row['required_db']:.1f}",
            "mixed" if row["timestep"] is None else f"{row['timestep']:g}",
            "" if row["ok"] else "FAILED",
        )
        for row in record["layers"]
    ]
    header = (
        *_denoiser(record["layers"][0], "denoiser"),
        *("layer", "dB", "required", "at timestep", ""),
    )
    print_table(folding_table("low-bit layers, in the order of execution", header, rows))
    print_line(f"first layer that leaves its bound: {record.get('first') or 'none'}")


def _print_bisection(record: dict[str, Any]) -> None:
    if not record["layers"]:
        print_line(f"bisection, {record['comparisons']} comparisons: no low-bit layer is to blame")
        return
    print_line(
        f"bisection, {record['comparisons']} comparisons: in float, {', '.join(record['layers'])} "
        f"repairs the output ({record['snr_db']:.1f} dB); in a policy:"
    )
    print_line(record["policy"])


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
