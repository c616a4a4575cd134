"""A report on disk: `index.html` and `report.json`, complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtq.errors import UsageError
from trtq.report.page import Page, render

__all__ = ["check_report_folder", "write_report"]

PAGE_NAME = "index.html"
NUMBERS_NAME = "report.json"


def check_report_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place before any long work.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / NUMBERS_NAME).is_file():
        raise UsageError(f"{folder} exists and is not a report of trtq; choose another --output")
    if not overwrite:
        raise UsageError(f"{folder} exists; choose another --output or pass --overwrite")


def write_report(folder: Path, page: Page, numbers: dict[str, Any], *, overwrite: bool) -> None:
    """Write both files into a new folder, beside its place first."""
    check_report_folder(folder, overwrite=overwrite)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / PAGE_NAME).write_text(render(page), encoding="utf-8")
        (partial / NUMBERS_NAME).write_text(json.dumps(numbers, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
