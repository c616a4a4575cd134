"""Output of commands: results, tables, and errors as one line with an exit code."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trtq.artefact.partial import RESUMABLE
from trtq.errors import ArtefactError, TrtqError
from trtq.processes import StoppedBySignal, ending_on_signals
from trtq.terminal import StderrHandler, internal_error, one_line, sane_environment, stop_writing

__all__ = [
    "BROKEN_PIPE",
    "command",
    "folding_table",
    "print_error",
    "print_line",
    "print_lines",
    "print_status",
    "print_table",
    "record_of",
    "show",
    "terminal_width",
]

BROKEN_PIPE = 141
"""The exit code that a shell reports for a program terminated by SIGPIPE."""
_NAME_WIDTH = 28
_NOISY_LOGGERS = ("matplotlib", "PIL", "asyncio", "onnx_ir", "onnxscript", "torch", "fsspec")


class _Console(Console):
    """A console that leaves the handling of a closed pipe to the command."""

    def on_broken_pipe(self) -> None:
        """Raise the exception that `print` raises."""
        raise BrokenPipeError


# Printed texts contain names given by users, whose brackets and colons are neither markup nor emoji.
_plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_err = _Console(stderr=True, _environ=sane_environment(), **_plain)
_out = _Console(_environ=sane_environment(), **_plain)


class _Result(Protocol):
    """A result of a library function."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `--json` prints."""


def print_error(text: str) -> None:
    """Print one red line to stderr, with control characters escaped."""
    _err.print(one_line(text), style="red", soft_wrap=True)


def print_status(text: str) -> None:
    """Print one line to stderr."""
    _err.print(text, soft_wrap=True)


def print_line(text: str = "", *, fold: bool = False) -> None:
    """Print a text to stdout; `fold` breaks it at words to the width of the terminal."""
    _out.print(text, soft_wrap=not fold)


def print_table(table: Table) -> None:
    """Print a table to stdout."""
    _out.print(table)


def terminal_width() -> int:
    """Number of columns of the terminal of stdout."""
    return _out.width


@contextmanager
def command(verbose: bool) -> Iterator[None]:
    """Turn errors of the block into one line and an exit code; `verbose` adds the traceback."""
    _start_logging(verbose)
    try:
        with ending_on_signals():
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError as err:
        # The reader of stdout has closed the pipe.
        stop_writing()
        raise typer.Exit(BROKEN_PIPE) from err
    except (TrtqError, OSError) as err:
        if verbose:
            _err.print_exception()
        print_error(f"error: {err}")
        raise typer.Exit(err.exit_code if isinstance(err, TrtqError) else 1) from err
    except KeyboardInterrupt as err:
        _print_end("interrupted", err)
        raise typer.Exit(130) from err
    except StoppedBySignal as err:
        _print_end(f"stopped by {err.name}", err)
        raise typer.Exit(int(err.code or 1)) from err
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as err:
        raise typer.Exit(internal_error(err, print_error, verbose=verbose)) from err


def _start_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        handlers=[StderrHandler()],
        force=True,
    )
    if not verbose:
        # transformers warns about image processors that no pipeline here uses; the variable is read
        # when transformers is imported.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _print_end(reason: str, err: BaseException) -> None:
    """Print one line, with the command that resumes from a checkpoint if there is one."""
    arguments = sys.argv[1:]
    if RESUMABLE in getattr(err, "__notes__", ()) and "quantize" in arguments[:1]:
        again = arguments if "--resume" in arguments else [*arguments, "--resume"]
        reason += f"; its checkpoints are kept, resume with: {shlex.join(['trtq', *again])}"
    # After SIGHUP the terminal is gone.
    with suppress(OSError):
        print_status(reason)


def record_of(result: dict[str, Any] | _Result) -> dict[str, Any]:
    """The JSON object of a result."""
    return result if isinstance(result, dict) else result.to_json()


def show(
    result: dict[str, Any] | _Result, as_json: bool, human: Callable[[dict[str, Any]], None]
) -> None:
    """Print a result, as one JSON object or for people.

    Args:
        result: result of a library function, or its JSON object.
        as_json: whether to print JSON.
        human: function that prints the JSON object for people.

    Raises:
        ArtefactError: stdout cannot be written, e.g. a full disk.
    """
    record = record_of(result)
    try:
        if as_json:
            print(json.dumps(_finite(record)))  # noqa: T201
        else:
            human(record)
        # Report a full disk here, not at interpreter exit.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        stop_writing()
        raise ArtefactError(f"cannot write the result to standard output: {err.strerror}") from err


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, with None."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def print_lines(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a title, then one row of texts per line; long texts are folded, not cut."""
    table = Table(title=title, show_header=bool(header), title_justify="left", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge = False, False
    for index in range(max(len(row) for row in rows) if rows else 0):
        name = header[index] if header else ""
        table.add_column(name, overflow="fold", no_wrap=False)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def folding_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Create a table that folds its cells in a narrow terminal, the first column last."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    name_width = max((len(row[0]) for row in rows), default=0)
    table.add_column(header[0], overflow="fold", min_width=min(name_width, _NAME_WIDTH))
    for name in header[1:]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
