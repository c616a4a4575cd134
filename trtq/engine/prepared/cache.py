"""Cache of prepared graphs, which ignores entries that another user could have written."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
from importlib import metadata
from pathlib import Path

from trtq.artefact.files import sha256
from trtq.engine import base
from trtq.engine.prepared.graph import PreparedGraph
from trtq.processor import has_vnni
from trtq.resources import cache_folder

__all__ = ["cache_key", "is_private", "read_cache", "rewrites_id", "write_cache"]

_CACHE = "graphs"
_GRAPH_FILE, _RECORD_FILE = "graph.onnx", "record.json"
_MAX_GRAPHS = 64
"""Maximum number of graphs in the cache; the least recently used are removed first."""
_MAX_BYTES = 256 << 20
"""Maximum size of a cached graph, in bytes; reading a larger graph from the cache saves little time."""
_PACKAGE = Path(__file__).parents[2]
_REWRITES = (_PACKAGE / "graph", Path(__file__).parent, Path(base.__file__))
"""Folders and files whose source code affects a prepared graph or its record."""
_RUNTIMES = ("onnxruntime", "onnxruntime-openvino", "onnxruntime-gpu")


def cache_key(path: Path, runtime: str) -> str:
    """SHA-256 of the graph's file, the runtime, the processor's features and the code of the rewrites.

    Args:
        path: file of the exported graph.
        runtime: runtime that is to run the graph.

    Raises:
        OSError: the file cannot be read.
    """
    variant = f"{runtime}-vnni" if has_vnni() else runtime
    record = [sha256(path), variant, _runtime_version(), rewrites_id()]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _runtime_version() -> str:
    for package in _RUNTIMES:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return "none"


@functools.cache
def rewrites_id() -> str:
    """SHA-256 of the source code that affects a prepared graph or its record."""
    files = {
        file
        for place in _REWRITES
        for file in ([place] if place.is_file() else place.rglob("*.py"))
    }
    texts = [f"{file.relative_to(_PACKAGE).as_posix()} {sha256(file)}" for file in sorted(files)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def is_private(path: Path, kind: int) -> bool:
    """Whether only this user can have written a file or folder.

    Args:
        path: file or folder; a link is neither.
        kind: `stat.S_IFREG` or `stat.S_IFDIR`.
    """
    status = path.lstat()
    owner = os.geteuid() if hasattr(os, "geteuid") else status.st_uid
    return (
        stat.S_IFMT(status.st_mode) == kind
        and status.st_uid == owner
        and not status.st_mode & 0o022
    )


def read_cache(key: str) -> PreparedGraph | None:
    """The cached graph of a key; None if it is missing, changed, or writable by another user."""
    try:
        folder = cache_folder(_CACHE) / key
        files = folder / _GRAPH_FILE, folder / _RECORD_FILE
        if not all(is_private(place, stat.S_IFDIR) for place in (folder.parent, folder)):
            return None
        if not all(is_private(file, stat.S_IFREG) for file in files):
            return None
        graph = PreparedGraph.of_record(files[0].read_bytes(), json.loads(files[1].read_bytes()))
        if graph is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.utime(folder)
    except (OSError, RuntimeError, ValueError, RecursionError):
        # RuntimeError: the user has no home folder, or has turned the cache off.
        return None
    return graph


def write_cache(key: str, graph: PreparedGraph) -> None:
    """Write a graph to the cache if possible; otherwise the next start is slower."""
    if len(graph.model) > _MAX_BYTES:
        return
    try:
        cache = cache_folder(_CACHE)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(cache, stat.S_IFDIR):
            return
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except (OSError, RuntimeError):
        return
    try:
        (partial / _GRAPH_FILE).write_bytes(graph.model)
        (partial / _RECORD_FILE).write_text(json.dumps(graph.record()), encoding="utf-8")
        for name in (_GRAPH_FILE, _RECORD_FILE):
            (partial / name).chmod(0o600)
        shutil.rmtree(cache / key, ignore_errors=True)
        partial.rename(cache / key)
        entries = sorted(cache.iterdir(), key=lambda entry: entry.lstat().st_mtime, reverse=True)
        for entry in entries[_MAX_GRAPHS:]:
            shutil.rmtree(entry, ignore_errors=True)
    except OSError:  # A full disk, or another process that writes the same entry at this moment.
        shutil.rmtree(partial, ignore_errors=True)
