"""`trtq doctor` and `trtq demo`: check this machine, and run the workflow on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trtq.commands.options import AsJson, Overwrite, Seed, Verbose, one_of, output_option, within
from trtq.commands.output import command, print_line, print_lines, print_table, record_of, show
from trtq.limits import MAX_IMAGES, MAX_ITERATIONS
from trtq.progress import ProgressPrinter

__all__ = ["demo", "doctor"]

DemoFolder = Annotated[Path, output_option("Folder for all output.")]
DemoImages = Annotated[
    int,
    typer.Option(
        "--images", callback=within(20, MAX_IMAGES), help="Number of images per model to evaluate."
    ),
]
DemoIterations = Annotated[
    int,
    typer.Option(
        "--iterations",
        callback=within(1, MAX_ITERATIONS),
        help="Number of fine-tuning iterations.",
    ),
]
DemoProvider = Annotated[
    str,
    typer.Option(
        "--provider", autocompletion=one_of("cpu", "openvino"), help="Runtime: cpu or openvino."
    ),
]


Advise = Annotated[
    str | None,
    typer.Option(
        "--advise",
        metavar="ARCH",
        autocompletion=one_of("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "cpu"),
        help="Show which format suits a GPU architecture, e.g. sm86, or cpu, and why.",
    ),
]


def doctor(advise: Advise = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show what is installed and what can run on this machine.

    Exit code 1 if something that the main path needs is missing. With --advise, show which format of
    `trtq quantize` suits a card instead.

    Example: trtq doctor --advise sm89
    """
    from trtq.engine.doctor import doctor as examine

    with command(verbose):
        if advise is not None:
            from trtq.engine.advice import advise as advice_for

            show(advice_for(advise), as_json, _print_advice)
            return
        record = record_of(examine())
        show(record, as_json, _print_machine)
    if not record["ok"]:
        raise typer.Exit(1)


def _print_advice(record: dict[str, Any]) -> None:
    title = f"{record['architecture']} ({record['cards']})"
    rows = [(row["option"], row["suits"], row["why"]) for row in record["formats"]]
    print_lines(title, rows, ("option", "suits", "why"))


def _print_machine(record: dict[str, Any]) -> None:
    from trtq.report.lines import doctor_rows

    print_lines("trtq doctor", doctor_rows(record))
    rows = [
        (
            extra["name"],
            ", ".join(f"{name} {version}" for name, version in extra["packages"].items() if version)
            or "-",
            extra["adds"],
            "" if extra["ok"] else f"{extra['install']} ({extra['problem']})",
        )
        for extra in record["extras"]
    ]
    print_lines("\nextras", rows, ("extra", "installed", "adds", "to install"))
    for problem in record["problems"]:
        print_line(f"! {problem}", fold=True)
    for hint in record["hints"]:
        print_line(f"- {hint}", fold=True)
    if record["ok"]:
        print_line("all well")


def demo(
    output: DemoFolder = Path("trtq-demo"),
    images: DemoImages = 500,
    iterations: DemoIterations = 350,
    provider: DemoProvider = "cpu",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole path on the digits model: quantise to W4A4, export, generate, evaluate, report.

    Example: trtq demo -o trtq-demo
    """
    from trtq.demo.digits import demo as run_demo

    with command(verbose):
        result = run_demo(
            output,
            images=images,
            iterations=iterations,
            provider=provider,
            seed=seed,
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        show(result, as_json, _print_demo)


def _print_demo(record: dict[str, Any]) -> None:
    table = Table(title="digits, 20 steps", title_justify="left")
    for column in ("model", "FD", "class accuracy", "bytes"):
        table.add_column(column)
    for row in record["rows"]:
        cells = (f"{row['fd']:.2f}", f"{row['class_accuracy']:.1%}", f"{row['bytes']:,}")
        table.add_row(row["name"], *cells)
    print_table(table)
    print_line(f"{record['seconds']:.0f} s; open {record['report']}")
