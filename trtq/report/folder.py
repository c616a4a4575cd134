"""A report on disk: `index.html` and `report.json`, complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtq._optional import require
from trtq.errors import UsageError
from trtq.manifest import partial_folder, put_in_place
from trtq.report.page import Page, render

__all__ = ["check_report_folder", "write_report"]

PAGE_NAME = "index.html"
NUMBERS_NAME = "report.json"


def check_report_folder(folder: Path, *, overwrite: bool) -> Path:
    """Refuse a place before any long work; the place without links is given back.

    Raises:
        UsageError: something is there that must not be replaced.
        MissingDependencyError: what reports are made with is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module)
    folder = folder.resolve()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not (folder / NUMBERS_NAME).is_file():
        raise UsageError(f"{folder} exists and is not a report of trtq; choose another --output")
    if not overwrite:
        raise UsageError(f"{folder} exists; choose another --output or pass --overwrite")
    return folder


def write_report(folder: Path, page: Page, numbers: dict[str, Any], *, overwrite: bool) -> None:
    """Write both files into a new folder, beside its place first."""
    folder = check_report_folder(folder, overwrite=overwrite)
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / PAGE_NAME).write_text(render(page), encoding="utf-8")
        (partial / NUMBERS_NAME).write_text(json.dumps(numbers, indent=2) + "\n")
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
