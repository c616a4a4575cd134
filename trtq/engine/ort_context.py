"""Engines that a provider of onnxruntime has compiled, kept from start to start as EP-context files.

With the session option `ep.context_enable`, onnxruntime writes a graph whose `EPContext` node names the
file of the compiled engine. Opening that graph loads the engine instead of compiling it. Source of the
options: onnxruntime's documentation, "EP Context Design".

Each engine has a folder of its own in the user's cache, whose name is a hash of all that the engine
depends on. The folder is written next to its place and renamed when it is complete; a list of its files
with their hashes is compared before an engine, which is machine code, is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.files import files_below, sha256
from trtq.engine.prepared.cache import is_private
from trtq.errors import TrtqError
from trtq.resources import cache_folder

__all__ = ["KeptSession", "context_key", "context_options", "kept_session"]

logger = logging.getLogger(__name__)

_CACHE = "onnxruntime-engines"
CONTEXT_FILE, _LISTING = "model.onnx", "files.json"
_MAX_ENGINES = 16
"""Maximum number of engines in the cache; the least recently used are removed first."""


@dataclass(frozen=True)
class KeptSession:
    """A session of a provider.

    Attributes:
        session: an `onnxruntime.InferenceSession`.
        metadata: metadata of the graph that the engine was compiled from.
        compiled: whether this start compiled the engine.
    """

    session: Any
    metadata: Mapping[str, str]
    compiled: bool


def context_key(parts: Sequence[str]) -> str:
    """Name of an engine's folder: SHA-256 of all that the engine depends on.

    Args:
        parts: hashes of the graph and its weights, options, versions, and the GPU.
    """
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def context_options(file: Path) -> dict[str, str]:
    """Session options with which onnxruntime writes the compiled engine next to `file`.

    The engine is a file of its own: a graph with more than 2 GiB inside cannot be stored.
    """
    return {
        "ep.context_enable": "1",
        "ep.context_file_path": str(file),
        "ep.context_embed_mode": "0",
    }


def kept_session(
    key: str, load: Callable[[Path], Any], compile_to: Callable[[Path | None], Any]
) -> KeptSession:
    """Open the kept engine of a key, or compile it and keep it.

    Args:
        key: see `context_key`.
        load: function that opens a session of a context file.
        compile_to: function that opens a session of the graph, and with a path has the provider write
            the context file there.

    Raises:
        TrtqError: the provider cannot start, or cannot compile the graph.
    """
    place = _place(key)
    metadata = None if place is None else _complete(place)
    if place is not None and metadata is not None:
        try:
            session = load(place / CONTEXT_FILE)
        except TrtqError as err:
            logger.warning("the kept engine in %s is compiled again: %s", place, err)
        else:
            return KeptSession(session, metadata, compiled=False)
    partial = None if place is None else _partial(place)
    if place is None or partial is None:
        return _compiled(compile_to(None))
    try:
        session = compile_to(partial / CONTEXT_FILE)
    except TrtqError as err:
        shutil.rmtree(partial, ignore_errors=True)
        logger.warning("the engine is compiled without being kept: %s", err)
        return _compiled(compile_to(None))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    kept = _compiled(session)
    _keep(partial, place, kept.metadata)
    return kept


def _compiled(session: Any) -> KeptSession:
    return KeptSession(session, dict(session.get_modelmeta().custom_metadata_map), compiled=True)


def _place(key: str) -> Path | None:
    """The folder of an engine; None if the user has no cache, or others can write to it."""
    try:
        cache = cache_folder(_CACHE)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cache / key if is_private(cache, stat.S_IFDIR) else None
    except (OSError, RuntimeError):  # RuntimeError: no home folder, or the cache is turned off.
        return None


def _partial(place: Path) -> Path | None:
    try:
        return Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    except OSError:
        return None


def _complete(place: Path) -> dict[str, str] | None:
    """The metadata of a kept engine's graph; None unless all files are there and unchanged."""
    try:
        if not is_private(place, stat.S_IFDIR) or not is_private(place / _LISTING, stat.S_IFREG):
            return None
        record = json.loads((place / _LISTING).read_bytes())
        files, metadata = record["files"], record["metadata"]
        present = {name for name in files_below(place) if name != _LISTING}
        if present != set(files) or CONTEXT_FILE not in files:
            return None
        if any(sha256(place / name) != digest for name, digest in files.items()):
            return None
        os.utime(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {str(name): str(value) for name, value in metadata.items()}


def _keep(partial: Path, place: Path, metadata: Mapping[str, str]) -> None:
    """Put a written engine in its place, if the provider has written one."""
    try:
        if not (partial / CONTEXT_FILE).is_file():
            shutil.rmtree(partial, ignore_errors=True)
            return
        names = list(files_below(partial))
        files = {name: sha256(partial / name) for name in names}
        text = json.dumps({"files": files, "metadata": dict(metadata)}, indent=1) + "\n"
        (partial / _LISTING).write_text(text, encoding="utf-8")
        for name in (*names, _LISTING):
            (partial / name).chmod(0o600)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        _trim(place.parent)
    except OSError as err:  # A full disk, or another process that keeps the same engine.
        logger.warning("the engine is not kept: %s", err)
        shutil.rmtree(partial, ignore_errors=True)


def _trim(cache: Path) -> None:
    kept = [entry for entry in cache.iterdir() if not entry.name.startswith(".")]
    kept.sort(key=lambda entry: entry.lstat().st_mtime, reverse=True)
    for entry in kept[_MAX_ENGINES:]:
        shutil.rmtree(entry, ignore_errors=True)
