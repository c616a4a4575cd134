"""The application: error handling, the order of commands, and former names of options."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import trtq
from trtq.commands.output import BROKEN_PIPE, print_error, print_line
from trtq.errors import UsageError
from trtq.terminal import internal_error, open_streams, stop_writing

__all__ = ["App", "OrderedGroup", "group", "main", "with_former_names"]

VERBS = (
    *("doctor", "quantize", "export", "build", "generate", "eval", "bench", "inspect", "verify"),
    *("serve", "package", "plugins", "demo", "selftest"),
)
"""The commands in the order of `trtq --help`: the workflow from a checkpoint to a server."""


class OrderedGroup(typer.core.TyperGroup):
    """Lists commands and groups in the order of the workflow."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands."""
        return sorted(super().list_commands(ctx), key=VERBS.index)


class App(typer.Typer):
    """The application behind the command `trtq`, which never shows an error as a traceback."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments, run the command and exit."""
        open_streams()
        try:
            Path.cwd()
        except OSError as err:
            print_error(
                f"error: the current folder cannot be used ({err.strerror}); change to another"
            )
            raise SystemExit(UsageError.exit_code) from err
        try:
            return super().__call__(*args, **kwargs)
        except BrokenPipeError:
            stop_writing()
            raise SystemExit(BROKEN_PIPE) from None
        except Exception as err:
            # Errors outside a command's body, from imports or from typer's parser.
            verbose = any(argument in ("-v", "--verbose") for argument in sys.argv[1:])
            raise SystemExit(internal_error(err, print_error, verbose=verbose)) from err


def group(cls: type[typer.core.TyperGroup] | None = None, **options: Any) -> typer.Typer:
    """A Typer for the commands of a group, e.g. `trtq package`."""
    return typer.Typer(cls=cls, rich_markup_mode=None, add_completion=False, **options)


def with_former_names(names: Mapping[str, str]) -> type[typer.core.TyperCommand]:
    """A command class that accepts former names of options; help and completion show the new names.

    Args:
        names: new name by former name, e.g. `{"--batch": "--batch-range"}`.
    """

    class Command(typer.core.TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Parse the arguments under the new names."""
            # Texts after "--" are arguments, not options.
            end = args.index("--") if "--" in args else len(args)
            return super().parse_args(ctx, [*map(_renamed, args[:end]), *args[end:]])

    def _renamed(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return names.get(name, name) + equals + value

    return Command


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(trtq.__version__)
        raise typer.Exit


def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Low-bit diffusion models: from a diffusers checkpoint to images."""
