"""`trtq selftest`: check and measure an NVIDIA GPU, and read the files of other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtq.commands.options import AsJson, Overwrite, Verbose, output_option, within
from trtq.commands.output import command, print_error, print_line, show
from trtq.errors import ArtefactError, UsageError
from trtq.progress import ProgressPrinter

__all__ = ["selftest"]

Output = Annotated[Path | None, output_option("JSON file for the result. Default: selftest.json.")]
Brief = Annotated[bool, typer.Option("--quick", help="Stages 0 to 2 only: about a minute.")]
DeviceIndex = Annotated[
    int, typer.Option("--device", callback=within(0, 63), help="CUDA's index of the GPU.")
]
Cases = Annotated[
    str | None,
    typer.Option(
        "--cases",
        metavar="PATTERNS",
        help="Only cases of stage 2 whose names match, e.g. 'tiles/w4a8*,tokens/*'.",
    ),
]
Read = Annotated[
    bool, typer.Option("--read", help="Print the tables of files instead of testing this machine.")
]
Files = Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Files to --read.")]


def selftest(
    files: Files = None,
    output: Output = None,
    brief: Brief = False,
    device: DeviceIndex = 0,
    cases: Cases = None,
    read: Read = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check and measure this machine's NVIDIA GPU, and write one file for the project.

    Every stage runs in a process of its own, and its outcome is recorded, so the command always ends.
    Exit code 1 if a check failed. The file has no names of host or user and no paths. With --read, print
    measured and predicted times of files.

    Example: trtq selftest -o selftest.json
    """
    with command(verbose):
        if read:
            if output or brief or cases:
                raise UsageError("--read only prints; leave out the options of a test")
            _read(files or [], as_json)
            return
        if files:
            raise UsageError(f"{files[0]} is an argument of --read; name the output with -o")
        from trtq.selftest.integers import check_patterns
        from trtq.selftest.run import selftest as measure
        from trtq.selftest.summary import summary_lines
        from trtq.selftest.trials import Options

        if cases is not None:
            check_patterns(cases)
        path = output or Path("selftest.json")
        record = measure(
            path,
            brief=brief,
            options=Options(device=device, cases=cases),
            overwrite=overwrite,
            progress=ProgressPrinter(),
        )
        lines = summary_lines(record, str(path))
        show(record, as_json, lambda _: print_line("\n".join(lines)))
        failed = record.failed
    if failed:
        raise typer.Exit(1)


def _read(files: list[Path], as_json: bool) -> None:
    """Print the table of each file; a bad file is one line on stderr, and the exit code is then 1."""
    from trtq.selftest.record import read_selftest
    from trtq.selftest.table import table_lines

    if not files:
        raise UsageError("--read needs files, e.g. trtq selftest --read selftest.json")
    records, bad = [], False
    for path in files:
        try:
            record = read_selftest(path)
        except ArtefactError as err:
            print_error(f"error: {err}")
            bad = True
            continue
        records.append(record.to_json())
        if not as_json:
            for line in table_lines(record):
                print_line(line)
            print_line()
    if as_json:
        show({"files": records}, as_json, lambda _: None)
    if bad:
        raise typer.Exit(1)
