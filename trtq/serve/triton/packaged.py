"""What can be packaged for Triton, found without torch."""

from __future__ import annotations

from pathlib import Path

from trtq.artefact.manifest import MANIFEST_NAME
from trtq.artefact.opened import Opened, Run, StoredArtefact, open_folder
from trtq.errors import UsageError

__all__ = ["open_packaged"]


def open_packaged(artefact: str | Path | Opened, *, verify: bool = True) -> StoredArtefact:
    """Open the ONNX or engine folder to package.

    Args:
        artefact: the folder, or an opened artefact.
        verify: see `trtq.artefact.opened.open_artefact`.

    Raises:
        UsageError: the path is not an artefact, or is an artefact of another kind.
        ArtefactError: the artefact is damaged.
    """
    if not isinstance(artefact, Opened) and not (Path(artefact) / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{artefact} is no artefact of trtq; make an ONNX folder first: trtq export RUN -o ONNX"
        )
    opened = open_folder(artefact, verify=verify)
    if isinstance(opened, Run):
        raise UsageError(
            f"{opened.folder} is a run, which no server loads; export it first: trtq export "
            f"{opened.folder} -o ONNX"
        )
    if opened.manifest.recorded is not None:
        raise UsageError(
            f"{opened.folder} runs inside its pipeline's own call, so no server of Triton can load it "
            f"yet; serve it over HTTP instead: trtq serve {opened.folder}"
        )
    return opened
