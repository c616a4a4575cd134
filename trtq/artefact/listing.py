"""Lists of trtq's files in a folder: `trtq-files.json` of reports, repositories and demonstrations.

Only files that trtq wrote are removed when a folder is replaced. An artefact lists its files in its
manifest; every other folder of trtq has a listing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtq.artefact.files import files_below, sha256
from trtq.documents import read_object
from trtq.errors import ArtefactError

__all__ = ["CHECKPOINTS", "LISTING_NAME", "Owned", "read_listing", "write_listing"]

LISTING_NAME = "trtq-files.json"
"""File that lists the files of a report, a Triton repository or a demonstration."""
LISTING_VERSION = 1
CHECKPOINTS = "checkpoints"
"""Folder of checkpoints in a run; the manifest does not list its files, so that they can be deleted."""
_CHECKPOINT_FILE = re.compile(
    rf"{CHECKPOINTS}/[^/]+/\.?iteration-\d+(\.partial)?/"
    r"(checkpoint\.json|model\.safetensors|process-\d+-of-\d+\.safetensors)"
)


@dataclass(frozen=True)
class Owned:
    """The files of a folder that belong to trtq.

    Attributes:
        kind: kind of the folder: `run`, `onnx`, `engine`, or the kind in its listing.
        files: SHA-256 by relative POSIX path; empty for a file that belongs to trtq with any content.
        record: name of the file that holds this list, which belongs to trtq too.
    """

    kind: str
    files: dict[str, str]
    record: str

    def holds(self, relative: str) -> bool:
        """Whether a file with this relative POSIX path belongs to trtq."""
        return (
            relative in self.files
            or relative == self.record
            or _CHECKPOINT_FILE.fullmatch(relative) is not None
        )


def read_listing(folder: Path) -> Owned | None:
    """Read the listing of a folder; None if there is no valid listing."""
    try:
        record = read_object(folder / LISTING_NAME)
    except ArtefactError:
        return None
    if record.get("trtq_listing") != LISTING_VERSION:
        return None
    kind, files = record.get("kind"), record.get("files")
    if not isinstance(kind, str) or not isinstance(files, dict):
        return None
    if not all(isinstance(digest, str) for digest in files.values()):
        return None
    return Owned(kind, files, LISTING_NAME)


def write_listing(
    folder: Path, kind: str, names: Sequence[str] | None = None, *, unhashed: Sequence[str] = ()
) -> None:
    """Record which files of a folder belong to trtq.

    Args:
        folder: the folder.
        kind: kind of the folder.
        names: names of the files; None: every file in the folder.
        unhashed: names of files without a recorded hash, since they are written later.
    """
    chosen = list(files_below(folder)) if names is None else names
    files = {name: sha256(folder / name) for name in chosen if name != LISTING_NAME}
    files |= dict.fromkeys(unhashed, "")
    record = {"trtq_listing": LISTING_VERSION, "kind": kind, "files": files}
    text = json.dumps(record, indent=2) + "\n"
    partial = folder / f".{LISTING_NAME}.trtq-partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / LISTING_NAME)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
