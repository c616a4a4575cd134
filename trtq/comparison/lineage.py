"""The artefacts that an artefact was made from."""

from __future__ import annotations

from pathlib import Path

from trtq.artefact.files import sha256
from trtq.artefact.manifest import MANIFEST_NAME
from trtq.artefact.manifest_file import find_origin, parse_manifest
from trtq.artefact.opened import Opened, StoredArtefact

__all__ = ["lineage", "origins"]


def lineage(opened: Opened) -> set[str]:
    """SHA-256 of the manifests of an artefact and of those that it was made from, as far as known."""
    assert isinstance(opened, StoredArtefact)
    hashes = set()
    for folder in (opened.folder, *origins(opened)):
        hashes.add(sha256(folder / MANIFEST_NAME))
        hashes.add(parse_manifest(folder).source.files.get(MANIFEST_NAME, ""))
    return hashes - {""}


def origins(opened: Opened) -> list[Path]:
    """The folders of the artefacts that an artefact was made from, as far as they are at hand."""
    assert isinstance(opened, StoredArtefact)
    folders: list[Path] = []
    folder = find_origin(opened.folder, opened.manifest)
    while folder is not None:
        folders.append(folder)
        folder = find_origin(folder, parse_manifest(folder))
    return folders
