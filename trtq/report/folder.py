"""Report folders: `index.html` and `report.json`, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtq._optional import require
from trtq.artefact.folder import check_output, claimed, new_artefact
from trtq.artefact.listing import write_listing
from trtq.artefact.outputs import check_place
from trtq.report.page import Page, render

__all__ = ["check_report_folder", "report_folder", "write_report"]

PAGE_NAME = "index.html"
NUMBERS_NAME = "report.json"


def check_report_folder(folder: Path, *, kind: str, overwrite: bool) -> Path:
    """Check the output folder of a report before any long work; return its absolute path.

    Args:
        folder: output folder.
        kind: kind of report, `eval`, `bench` or `demo report`; only a report of the same kind is
            replaced.
        overwrite: replace an existing report.

    Raises:
        UsageError: the folder contains something that must not be replaced.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module)
    return check_output(folder, overwrite=overwrite, kind=kind)


@contextmanager
def report_folder(folder: Path | None, *, kind: str, overwrite: bool) -> Iterator[None]:
    """Reserve the output folder during the block, see `check_report_folder`; None means no report.

    Args:
        folder: output folder; None: no report.
        kind: see `check_report_folder`.
        overwrite: whether to replace an existing report.

    Raises:
        UsageError: another process writes to the folder.
    """
    if folder is None:
        yield
        return
    with claimed(check_place(folder)):
        check_report_folder(folder, kind=kind, overwrite=overwrite)
        yield


def write_report(
    folder: Path, page: Page, numbers: dict[str, Any], *, kind: str, overwrite: bool
) -> None:
    """Write both files to a temporary folder, and move that folder to `folder`.

    Args:
        folder: output folder.
        page: content of `index.html`.
        numbers: content of `report.json`.
        kind: see `check_report_folder`.
        overwrite: replace an existing report.

    Raises:
        UsageError: the folder contains something that must not be replaced.
        ArtefactError: the disk is full, or writing fails.
    """
    folder = check_report_folder(folder, kind=kind, overwrite=overwrite)
    with new_artefact(folder, kind=kind, overwrite=overwrite) as partial:
        (partial / PAGE_NAME).write_text(render(page), encoding="utf-8")
        text = json.dumps(numbers, indent=2) + "\n"
        (partial / NUMBERS_NAME).write_text(text, encoding="utf-8")
        write_listing(partial, kind)
