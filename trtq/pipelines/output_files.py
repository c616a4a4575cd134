"""Paths of generated files: one file, or a folder with one file per result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from trtq.artefact.folder import check_outside_artefacts
from trtq.artefact.outputs import check_file, check_place
from trtq.errors import UsageError
from trtq.pipelines.sheet import save_png

__all__ = ["check_files", "output_files", "save_each", "written_together"]


def check_files(target: Path, files: Sequence[Path], source: Any, *, overwrite: bool) -> None:
    """Raise unless the files may be written, before any long work.

    Raises:
        UsageError: a file must not be replaced, or a path is not writable.
    """
    if files != [target]:
        check_place(target, source=source)
    if files == [target] or target.is_dir():
        for file in files:
            check_file(file, overwrite=overwrite, source=source)
    check_outside_artefacts(files[0])


@contextmanager
def written_together(folder: Path) -> Iterator[Callable[[Path], None]]:
    """Create a folder of files; if the block fails, remove the new files, and the folder if it is new.

    Args:
        folder: the folder.

    Yields:
        A function to call with the path of each file before it is written.
    """
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    new: list[Path] = []
    try:
        yield lambda file: new.extend([] if file.exists() else [file])
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def save_each(
    sheets: Sequence[np.ndarray],
    files: Sequence[Path],
    texts: Callable[[int], dict[str, str]],
    *,
    overwrite: bool,
) -> None:
    """Write one PNG file per image; if a file cannot be written, remove the new files."""
    with written_together(files[0].parent) as writes:
        for index, (sheet, file) in enumerate(zip(sheets, files, strict=True)):
            writes(file)
            save_png(sheet, file, texts(index), overwrite=overwrite)


def output_files(target: Path, given: str, images: int) -> list[Path]:
    """The files to write: one sheet, or one per image in a folder.

    Raises:
        UsageError: the name has a suffix other than `.png`, its parent folder does not exist, or a file
            has the name of the folder.
    """
    folder = target.is_dir() or given.endswith(("/", os.sep)) or not target.suffix
    if not folder and target.suffix.lower() != ".png":
        raise UsageError(
            f"--output must end in .png for one sheet, or name a folder for one file per image; got "
            f"{target.name!r}"
        )
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    if not folder:
        return [target]
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; give a name that ends in .png, or a folder")
    digits = max(4, len(str(images - 1)))
    return [target / f"image-{index:0{digits}d}.png" for index in range(images)]
