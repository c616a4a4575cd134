"""The rows of a benchmark as the user names them: `PATH` or `PATH@PROVIDER`."""

from __future__ import annotations

from pathlib import Path

from trtq.engine.ort import PROVIDERS
from trtq.errors import UsageError

__all__ = ["check_known", "split_row"]

RESERVED = ("kernels",)
"""Subcommands of `trtq bench`, which are not paths."""
_TORCH = "torch"


def split_row(text: str) -> tuple[str, str]:
    """Path and provider of a row; the provider is empty if the text names none.

    Raises:
        UsageError: the text is the name of a subcommand.
    """
    if text in RESERVED:
        raise UsageError(f"{text!r} is a subcommand; write ./{text} for a folder of that name")
    path, at, named = text.rpartition("@")
    return (text, "") if not at or not path or Path(text).exists() else (path, named)


def check_known(provider: str) -> None:
    """Raise unless a provider is one that trtq knows; it may not be installed.

    Raises:
        UsageError: the provider is unknown.
    """
    known = (_TORCH, *PROVIDERS)
    if provider not in known:
        raise UsageError(f"unknown provider {provider!r}; choose one of {', '.join(known)}")
