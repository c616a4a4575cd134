"""Reading and writing of `manifest.json`, and its comparison with an artefact's files.

Reading verifies the format version, that every path stays inside the folder, and every hash. A file that
the manifest does not list (a README, files of a file manager or of git) is ignored and reported once
in a warning, unless a loader of the artefact would read it, which is an error.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata
from pathlib import Path, PurePosixPath

from pydantic import (
    ValidationError,
)

from trtq.artefact.contents import find_strays
from trtq.artefact.files import files_below, sha256, special_kind
from trtq.artefact.listing import CHECKPOINTS
from trtq.artefact.manifest import FORMAT_VERSION, MANIFEST_NAME, Kind, Manifest
from trtq.artefact.manifest_rows import SourceRow
from trtq.artefact.records import (
    path_fault,
)
from trtq.documents import explain_first, parse_json, read_text, shown
from trtq.errors import ArtefactError, IntegrityError

__all__ = [
    "artefact_kind",
    "check_kind",
    "checked_path",
    "file_hashes",
    "find_origin",
    "has_manifest",
    "made_from",
    "package_versions",
    "parse_manifest",
    "verify_files",
    "write_manifest",
]

logger = logging.getLogger(__name__)

_PACKAGES = (
    "trtq",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnx-ir",
    "onnxruntime-openvino",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape an artefact."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative POSIX path, without manifest and checkpoints."""
    return {
        name: sha256(folder / name)
        for name in files_below(folder)
        if name != MANIFEST_NAME
        and not name.startswith(f"{CHECKPOINTS}/")
        and (folder / name).is_file()
    }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of a finished folder, write its manifest as the last file, and return it."""
    complete = manifest.model_copy(
        update={"files": file_hashes(folder), "packages": package_versions()}
    )
    (folder / MANIFEST_NAME).write_text(complete.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return complete


def made_from(folder: Path, manifest: Manifest) -> SourceRow:
    """The entry `source` of an artefact that is made from this artefact."""
    hashes = {MANIFEST_NAME: sha256(folder / MANIFEST_NAME)}
    return SourceRow(name=folder.name, files=hashes | manifest.files)


def find_origin(folder: Path, manifest: Manifest, given: str | Path | None = None) -> Path | None:
    """Find the artefact that another artefact was made from, if it is unchanged.

    Args:
        folder: folder of the other artefact.
        manifest: manifest of the other artefact.
        given: folder to search; by default next to the other artefact, then the current folder.

    Returns:
        Folder of the artefact; None if it is missing or changed, or if the other artefact was made from
        a checkpoint.
    """
    expected = manifest.source.files.get(MANIFEST_NAME)
    name = manifest.source.name
    places = (folder.resolve().parent / name, Path(name)) if given is None else (Path(given),)
    for place in places:
        record = place / MANIFEST_NAME
        if expected is not None and record.is_file() and sha256(record) == expected:
            return place
    return None


def has_manifest(folder: Path) -> bool:
    """Whether a folder has an entry for a manifest; reading it may still fail, e.g. if it is a pipe."""
    path = folder / MANIFEST_NAME
    return path.exists() or path.is_symlink()


def artefact_kind(folder: Path) -> Kind | None:
    """Kind of the artefact in a folder; None if the folder has no manifest.

    Raises:
        ArtefactError: the manifest cannot be read.
    """
    return parse_manifest(folder).kind if has_manifest(folder) else None


def parse_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artefact, without hashing its files.

    Returns:
        The manifest.

    Raises:
        ArtefactError: the manifest cannot be read.
        IntegrityError: the file is not a manifest of trtq, or its version is unknown.
    """
    path = folder / MANIFEST_NAME
    try:
        record = parse_json(read_text(path))
    except ValueError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {err}") from err
    if not isinstance(record, dict) or "format_version" not in record:
        raise IntegrityError(f"{path} is not a manifest of trtq: 'format_version' is missing")
    version = record["format_version"]
    if type(version) is not int:
        raise IntegrityError(
            f"{path} is not a manifest of trtq: format_version is a number, got {shown(version)}"
        )
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{folder} has format version {version}, this trtq reads {FORMAT_VERSION}; make it again "
            "with this version"
        )
    try:
        manifest = Manifest.model_validate(record)
        manifest.check_whole()
    except ValidationError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {explain_first(err)}") from err
    except ValueError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {err}") from err
    return manifest


def checked_path(folder: Path, relative: str) -> Path:
    """Path of a file that a manifest names.

    Raises:
        IntegrityError: the path leaves the folder.
    """
    fault = path_fault(relative)
    path = folder / PurePosixPath(relative) if fault is None else folder
    # realpath, since resolve() raises a different error for circular links.
    if fault is None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        fault = "leaves the folder"
    if fault is not None:
        raise IntegrityError(
            f"{folder / MANIFEST_NAME} names {shown(relative)}, which {fault}; do not use it"
        )
    return path


def check_kind(folder: Path, manifest: Manifest, *kinds: Kind) -> None:
    """Raise unless an artefact is of one of these kinds; every kind is permitted if none is given.

    Raises:
        ArtefactError: the artefact is of another kind.
    """
    if kinds and manifest.kind not in kinds:
        raise ArtefactError(
            f"{folder} is of kind {manifest.kind!r}; {' or '.join(kinds)} is required"
        )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless every file of an artefact matches its manifest.

    Raises:
        IntegrityError: a path leaves the folder, a file is missing or does not match the manifest, or a
            loader would read a file that is not listed.
    """
    for relative, expected in manifest.files.items():
        path = checked_path(folder, relative)
        special = special_kind(path)
        if special is not None:
            raise IntegrityError(f"{path} is {special}, though the manifest lists it as a file")
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, though the manifest lists it")
        if sha256(path) != expected:
            raise IntegrityError(
                f"{path} is not what the manifest says (SHA-256 differs): it was changed or damaged"
            )
    _look_for_strays(folder, manifest)


_warned: set[Path] = set()


def _look_for_strays(folder: Path, manifest: Manifest) -> None:
    """Warn once about files that the manifest does not list.

    Raises:
        IntegrityError: a loader of the artefact would read such a file.
    """
    strays = find_strays(folder, manifest.files, MANIFEST_NAME)
    for stray in strays:
        if stray.problem is not None:
            raise IntegrityError(f"{folder / stray.name} {stray.problem}; move it out of {folder}")
    place = folder.resolve()
    if strays and place not in _warned:
        _warned.add(place)
        logger.warning(
            "%s holds %s that the manifest does not list, e.g. %s; left alone and not read",
            folder,
            f"{len(strays)} entries" if len(strays) > 1 else "1 entry",
            strays[0].name,
        )
