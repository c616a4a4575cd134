"""The files of a pipeline's folder that a loader reads.

diffusers, transformers, onnxruntime and TensorRT choose files by name. They ignore hidden files and
files with other names: a README, or files of git, the hub or a file manager.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trtq.artefact.files import sha256, special_kind
from trtq.artefact.listing import CHECKPOINTS
from trtq.documents import read_object
from trtq.errors import ArtefactError

__all__ = ["Stray", "changed_source_file", "find_strays", "source_hashes"]

_INDEX = "model_index.json"
_ROOT_FILES = frozenset(
    {_INDEX, "classes.json", "prompts.json", "quantized.safetensors", "trained.safetensors"}
)
"""Files in the pipeline's own folder that are read if they exist."""
_READ_SUFFIXES = frozenset(
    (
        *(".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack"),
        *(".h5", ".onnx", ".pb", ".engine", ".plan", ".data", ".npz", ".npy", ".gguf", ".py"),
        *(".jinja", ".model", ".spm", ".codes", ".bpe", ".tiktoken", ".tokenizer", ".vocab"),
        ".index",
    )
)
_READ_NAMES = frozenset({"vocab.txt", "merges.txt", "dict.txt"})
_READ_BEGINNINGS = ("model.onnx", "model.engine")
"""Suffixes, names and prefixes of the files that are read in a component's folder."""
_MAX_DEPTH = 6
"""Maximum depth of nested folders in a component."""
_TWO_BYTE_LENGTH = 128
"""Strings of this length or more have a length prefix of two bytes in protobuf."""


@dataclass(frozen=True)
class Stray:
    """An entry of an artefact's folder that its manifest does not list.

    Attributes:
        name: relative POSIX path of a file, or of a folder without any file of the artefact.
        problem: reason why the entry is not allowed, as the end of a sentence; None if it is harmless.
    """

    name: str
    problem: str | None


def source_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a pipeline's folder that a loader reads, by relative POSIX path."""
    parts = _named_components(folder)
    return {
        name: sha256(folder / name)
        for name in _files_through_links(folder, parts)
        if _would_be_read(name, parts)
    }


def changed_source_file(
    folder: Path, recorded: Mapping[str, str], *, all_there: bool
) -> str | None:
    """The first file that changed since its hash was recorded; None if no file changed.

    Args:
        folder: the pipeline's folder.
        recorded: the earlier result of `source_hashes`; older versions recorded every file.
        all_there: whether a missing file counts as changed.
    """
    parts = _named_components(folder)
    for name, digest in recorded.items():
        if not _would_be_read(name, parts):
            continue
        path = folder / name
        if path.is_file():
            if sha256(path) != digest:
                return name
        elif all_there:
            return name
    return None


def find_strays(folder: Path, files: Mapping[str, str], record: str) -> list[Stray]:
    """Find the entries of an artefact's folder that are not listed.

    Args:
        folder: folder of the artefact.
        files: SHA-256 of the listed files by relative POSIX path.
        record: name of the file that holds the list.

    Returns:
        One entry per unlisted file, and per folder without any listed file.
    """
    parts = frozenset(PurePosixPath(name).parts[0] for name in files if "/" in name)
    parts |= _named_components(folder)
    graphs = [name for name in files if name.endswith(".onnx")]
    names = _unlisted(folder, frozenset((*files, record)), parts)
    return [Stray(name, _problem(folder, name, parts, graphs)) for name in names]


def _would_be_read(name: str, parts: Collection[str]) -> bool:
    """Whether a loader would read a file of this name in a folder with these components."""
    first, *rest = PurePosixPath(name).parts
    if not rest:
        return name.lower() in _ROOT_FILES
    if first not in parts or any(part.startswith(".") for part in rest):
        return False
    last = rest[-1].lower()
    suffix = PurePosixPath(last).suffix
    return suffix in _READ_SUFFIXES or last in _READ_NAMES or last.startswith(_READ_BEGINNINGS)


def _named_components(folder: Path) -> frozenset[str]:
    """The components that a pipeline's index names."""
    path = folder / _INDEX
    try:
        # Use the loader's reader, so that the same files are accepted, e.g. with a byte-order mark.
        index = read_object(path) if path.is_file() else {}
    except (ArtefactError, OSError):
        return frozenset()
    return frozenset(name for name, entry in index.items() if isinstance(entry, list))


def _files_through_links(folder: Path, parts: Collection[str]) -> list[str]:
    """Relative paths of all files in a folder and its components; links are followed."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        below = Path(place).relative_to(folder)
        # Without these limits circular links would be followed endlessly.
        deep = len(below.parts) >= _MAX_DEPTH
        here = Path(os.path.realpath(place))
        around = {here, *here.parents}
        folders[:] = sorted(
            name
            for name in folders
            if not (deep or name.startswith("."))
            and (below.parts or name in parts)
            and Path(os.path.realpath(Path(place, name))) not in around
        )
        paths += [(below / name).as_posix() for name in names if Path(place, name).is_file()]
    return sorted(paths)


def _unlisted(folder: Path, known: Collection[str], parts: Collection[str]) -> Iterator[str]:
    """Relative paths of unknown entries; a folder without any known file counts as one entry."""
    ours = {str(parent) for name in known for parent in PurePosixPath(name).parents}

    def below(prefix: str) -> Iterator[str]:
        with os.scandir(folder / prefix) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{prefix}{entry.name}"
            folder_itself = entry.is_dir(follow_symlinks=False)
            if name in known or (name == CHECKPOINTS and folder_itself):
                continue
            in_part = PurePosixPath(name).parts[0] in parts and not entry.name.startswith(".")
            if folder_itself and (name in ours or in_part):
                yield from below(f"{name}/")
            else:
                yield name

    yield from below("")


def _problem(
    folder: Path, name: str, parts: Collection[str], graphs: Collection[str]
) -> str | None:
    path = folder / name
    kind = special_kind(path)
    if kind is not None:
        return f"is {kind}; an artefact holds files"
    if _would_be_read(name, parts):
        return "is not in the manifest, and what opens the artefact would read it"
    if path.is_symlink() and path.is_dir() and PurePosixPath(name).parts[0] in parts:
        return "is not in the manifest: a link to a folder, which would be read"
    for graph in graphs:
        if _may_name(folder, graph, name):
            return f"is not in the manifest, and {graph} may read it as its weights"
    return None


def _may_name(folder: Path, graph: str, name: str) -> bool:
    """Whether a graph may read weights from a file; False is certain, since the graph is not parsed.

    A location is a protobuf string: a tag, the length, and the path from the graph's folder.
    """
    inside = name.startswith(f"{PurePosixPath(graph).parent.as_posix()}/")
    file_name = PurePosixPath(name).name.encode(errors="surrogateescape")
    try:
        with (
            (folder / graph).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):

            def has(text: bytes) -> bool:
                return content.find(text) >= 0

            if not has(b"location"):
                return False
            if not inside:
                return has(b"../") and has(b"/" + file_name)
            whole = len(file_name) >= _TWO_BYTE_LENGTH or has(
                b"\x12" + bytes([len(file_name)]) + file_name
            )
            return whole or has(b"/" + file_name)
    except (OSError, ValueError):  # ValueError: the file is empty.
        return False
