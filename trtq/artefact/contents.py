"""Which files of a pipeline's folder count: those that a loader reads.

diffusers, transformers, onnxruntime and TensorRT choose files by name. What has another name, and what
is hidden, they leave alone: a README, what git, the hub or a file manager puts there.
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
"""What is read from the folder itself, where it is there."""
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
"""How the names of files end, are, or begin that are read in a component's folder."""
_DEEPEST = 6
"""Folders inside each other that a component may have."""
_SHORT = 128
"""From this length on, protobuf needs a second byte for it."""


@dataclass(frozen=True)
class Stray:
    """Something in an artefact's folder that its manifest does not list.

    Attributes:
        name: relative POSIX path; of a folder without anything of the artefact's, the folder's.
        problem: why it cannot stay, as the end of a sentence; None: it is nobody's business.
    """

    name: str
    problem: str | None


def source_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a pipeline's folder that go into what is made from it, by POSIX path."""
    parts = _parts_named(folder)
    return {
        name: sha256(folder / name)
        for name in _files_through_links(folder, parts)
        if _is_read(name, parts)
    }


def changed_source_file(
    folder: Path, recorded: Mapping[str, str], *, all_there: bool
) -> str | None:
    """The first file that went into something and is not what it was; None: all are.

    Args:
        folder: the pipeline's folder.
        recorded: what `source_hashes` gave then; older versions recorded every file.
        all_there: a file that is missing counts as changed.
    """
    parts = _parts_named(folder)
    for name, digest in recorded.items():
        if not _is_read(name, parts):
            continue
        path = folder / name
        if path.is_file():
            if sha256(path) != digest:
                return name
        elif all_there:
            return name
    return None


def find_strays(folder: Path, files: Mapping[str, str], record: str) -> list[Stray]:
    """What lies in an artefact's folder without being listed.

    Args:
        folder: the artefact.
        files: what is listed, by relative POSIX path.
        record: the file that lists it.
    """
    parts = frozenset(PurePosixPath(name).parts[0] for name in files if "/" in name)
    parts |= _parts_named(folder)
    graphs = [name for name in files if name.endswith(".onnx")]
    names = _unlisted(folder, frozenset((*files, record)), parts)
    return [Stray(name, _problem(folder, name, parts, graphs)) for name in names]


def _is_read(name: str, parts: Collection[str]) -> bool:
    """Whether a loader would read a file of this name in a folder with these components."""
    first, *rest = PurePosixPath(name).parts
    if not rest:
        return name.lower() in _ROOT_FILES
    if first not in parts or any(part.startswith(".") for part in rest):
        return False
    last = rest[-1].lower()
    suffix = PurePosixPath(last).suffix
    return suffix in _READ_SUFFIXES or last in _READ_NAMES or last.startswith(_READ_BEGINNINGS)


def _parts_named(folder: Path) -> frozenset[str]:
    """The components that a pipeline's index names."""
    path = folder / _INDEX
    try:
        # The reader of those who load the folder: what it takes, a byte-order mark say, counts here.
        index = read_object(path) if path.is_file() else {}
    except (ArtefactError, OSError):
        return frozenset()
    return frozenset(name for name, entry in index.items() if isinstance(entry, list))


def _files_through_links(folder: Path, parts: Collection[str]) -> list[str]:
    """Relative paths of all files in a folder and its components, also where links lead to them."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        below = Path(place).relative_to(folder)
        # Links that lead round in a circle would be followed for ever.
        deep = len(below.parts) >= _DEEPEST
        here = Path(os.path.realpath(place))
        around = {here, *here.parents}
        folders[:] = sorted(
            name
            for name in folders
            if not (deep or name.startswith("."))
            and (below.parts or name in parts)
            and Path(os.path.realpath(Path(place, name))) not in around
        )
        found += [(below / name).as_posix() for name in names if Path(place, name).is_file()]
    return sorted(found)


def _unlisted(folder: Path, known: Collection[str], parts: Collection[str]) -> Iterator[str]:
    """Relative paths of what is not known; a folder that holds nothing of ours counts as one."""
    ours = {str(parent) for name in known for parent in PurePosixPath(name).parents}

    def below(prefix: str) -> Iterator[str]:
        with os.scandir(folder / prefix) as found:
            entries = sorted(found, key=lambda entry: entry.name)
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
    if _is_read(name, parts):
        return "is not in the manifest, and what opens the artefact would read it"
    if path.is_symlink() and path.is_dir() and PurePosixPath(name).parts[0] in parts:
        return "is not in the manifest: a link to a folder, which would be read"
    for graph in graphs:
        if _may_name(folder, graph, name):
            return f"is not in the manifest, and {graph} may read it as its weights"
    return None


def _may_name(folder: Path, graph: str, name: str) -> bool:
    """Whether a graph may name a file as that of its weights; not parsed, and rather yes than no.

    A location is a string of protobuf: a tag, the length, and the path from the graph's folder.
    """
    inside = name.startswith(f"{PurePosixPath(graph).parent.as_posix()}/")
    own = PurePosixPath(name).name.encode(errors="surrogateescape")
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
                return has(b"../") and has(b"/" + own)
            whole = len(own) >= _SHORT or has(b"\x12" + bytes([len(own)]) + own)
            return whole or has(b"/" + own)
    except (OSError, ValueError):  # ValueError: the file is empty.
        return False
