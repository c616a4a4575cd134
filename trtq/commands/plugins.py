"""`trtq plugins build`: compile the CUDA kernels ahead of their first use."""

from __future__ import annotations

from typing import Annotated

import typer

from trtq.commands.options import AsJson, Verbose
from trtq.commands.output import command, print_lines, show
from trtq.progress import ProgressPrinter

__all__ = ["build_plugins"]

Architectures = Annotated[
    list[str] | None,
    typer.Option("--arch", help="GPU architecture, e.g. sm89; may be repeated. Default: all."),
]


def build_plugins(
    arch: Architectures = None, as_json: AsJson = False, verbose: Verbose = False
) -> None:
    """Compile all CUDA kernels ahead of their first use; needs neither a GPU nor nvcc.

    Example: trtq plugins build --arch sm89
    """
    from trtq.plugins.compile import build_all
    from trtq.plugins.variants import ARCHITECTURES

    with command(verbose):
        kernels = build_all(tuple(arch or ARCHITECTURES), ProgressPrinter())
        rows = [(name, f"{len(variants)} kernels") for name, variants in kernels.items()]
        show(kernels, as_json, lambda _: print_lines("kernels", rows))
