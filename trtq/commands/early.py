"""Checks of a command's paths before the libraries are imported, which takes seconds.

The functions called here load no torch. The work itself makes the same checks with the same messages;
here they only come early.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trtq.commands.output import print_status

__all__ = [
    "check_artefact",
    "check_calls",
    "check_folder",
    "check_graphs",
    "check_model",
    "check_packaged",
    "check_rows",
    "say_loading",
]


def check_model(place: str, config: str | Path | None = None) -> None:
    """Raise unless a path can be an artefact or a checkpoint.

    Args:
        place: path, name of a shipped model, or hub id.
        config: folder or hub id that configures a single-file checkpoint.

    Raises:
        TrtqError: there is no model, or its manifest cannot be read.
    """
    from trtq.artefact.opened import Checkpoint, open_artefact
    from trtq.checkpoint.resolve import resolve_model
    from trtq.checkpoint.weight_files import single_file

    opened = open_artefact(place, verify=False, config=config)
    if not isinstance(opened, Checkpoint):
        return
    if single_file(place) is None:
        resolve_model(place)


def check_artefact(place: str | Path) -> None:
    """Raise unless a path is an artefact.

    Raises:
        TrtqError: there is no artefact, or its manifest cannot be read.
    """
    from trtq.artefact.opened import open_artefact, stored

    stored(open_artefact(place, verify=False))


def check_graphs(place: str | Path) -> None:
    """Raise unless a folder holds ONNX graphs.

    Raises:
        TrtqError: there is no artefact, it is of another kind, or its manifest cannot be read.
    """
    from trtq.artefact.opened import open_onnx

    open_onnx(place, verify=False)


def check_packaged(place: str | Path) -> None:
    """Raise unless a folder can be packaged for Triton.

    Raises:
        TrtqError: there is no artefact, it is of another kind, or its manifest cannot be read.
    """
    from trtq.serve.triton.packaged import open_packaged

    open_packaged(place, verify=False)


def check_rows(rows: Sequence[str], providers: Sequence[str]) -> None:
    """Raise unless the rows of a benchmark name artefacts or checkpoints, and known providers.

    Args:
        rows: `PATH` or `PATH@PROVIDER` each.
        providers: providers of rows that name none.

    Raises:
        TrtqError: there is no model, its manifest cannot be read, or a provider is unknown.
    """
    from trtq.bench.row_texts import check_known, split_row

    for provider in providers:
        check_known(provider)
    for row in rows:
        path, named = split_row(row)
        check_model(path)
        if named:
            check_known(named)


def check_folder(output: Path | None, source: str | Path, kind: str, *, overwrite: bool) -> None:
    """Raise unless an output folder can be written.

    Raises:
        UsageError: the folder exists, or would replace the input.
    """
    from trtq.artefact.folder import check_output

    if output is not None:
        check_output(output, overwrite=overwrite, source=source, kind=kind)


def check_calls(paths: Sequence[Path]) -> None:
    """Raise unless the files of `--call` can be read.

    Raises:
        UsageError: a file cannot be read, or is not TOML.
    """
    from trtq.calls.call_file import read_call_file

    for path in paths:
        read_call_file(path)


def say_loading() -> None:
    """Say in a terminal that the libraries are being imported."""
    if "torch" not in sys.modules and sys.stderr is not None and sys.stderr.isatty():
        print_status("loading torch and diffusers")
