"""The files of a pipeline other than its graphs."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from trtq.artefact.manifest import Manifest
from trtq.graph.file import DATA_NAME, MODEL_FILE

__all__ = ["copy_parts"]


def copy_parts(folder: Path, manifest: Manifest, out: Path) -> None:
    """Copy everything of a pipeline except its graphs: configurations, tokenizers, the scheduler.

    Args:
        folder: the ONNX folder.
        manifest: manifest of the ONNX folder.
        out: destination folder of the copies.
    """
    for name in manifest.files:
        if PurePosixPath(name).name in (MODEL_FILE, DATA_NAME):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
