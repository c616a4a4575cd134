"""Graphs as a runtime takes them, rewritten once: kept in the user's cache, or by a child process.

`trtq.graph.runtimes.prepare.prepare` needs onnx_ir, onnx and torch. What only opens graphs, a server
above all, gets bytes from here and imports none of them. They are in the user's cache since the
export on this machine, or since the first time; else a process of its own rewrites the graph. Where
onnx_ir is loaded already, the graph is rewritten here and now.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trtq import errors
from trtq.artefact.files import sha256
from trtq.engine.base import TensorSpec
from trtq.errors import ArtefactError, TrtqError
from trtq.processes import crash_name, last_words, lifeline, worker_command
from trtq.processor import has_vnni
from trtq.resources import cache_folder

__all__ = [
    "PreparedGraph",
    "graph_specs",
    "keep_prepared",
    "prepare_in_process",
    "prepared_graph",
    "variant_name",
]

OnCpu = Literal["onnxruntime", "openvino"]
_CACHE = "graphs"
_GRAPH_FILE, _RECORD_FILE = "graph.onnx", "record.json"
_KEPT = 64
"""Graphs in the cache; those that were not used for longest go first."""
_MAX_BYTES = 256 << 20
"""Of a graph in the cache; a larger one takes long to read, too."""
_SECONDS = 1800.0
_LAST_LINES = 3
_PASSES = Path(__file__).parents[1] / "graph"
_RUNTIMES = ("onnxruntime", "onnxruntime-openvino", "onnxruntime-gpu")


@dataclass(frozen=True)
class PreparedGraph:
    """What a session is made of; external data lie where those of the exported graph do.

    Attributes:
        model: serialized. For OpenVINO every axis of an input has the name `INPUT.AXIS`, so that a
            session can be given its sizes, and no other value has a shape.
        inputs: of the exported graph, by name.
        outputs: of the exported graph, by name.
        metadata: what the graph's file says about itself.
    """

    model: bytes
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """Everything but the graph, and its SHA-256, for a file."""
        return {
            "sha256": hashlib.sha256(self.model).hexdigest(),
            "inputs": _plain(self.inputs),
            "outputs": _plain(self.outputs),
            "metadata": dict(self.metadata),
        }

    @classmethod
    def of_record(cls, model: bytes, record: Mapping[str, Any]) -> PreparedGraph | None:
        """From what `record` gave; None: the graph is another one, or the record none of ours."""
        try:
            if hashlib.sha256(model).hexdigest() != record["sha256"]:
                return None
            return cls(
                model, _specs(record["inputs"]), _specs(record["outputs"]), record["metadata"]
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def _plain(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    return {name: [spec.dtype.name, list(spec.shape)] for name, spec in specs.items()}


def _specs(found: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(np.dtype(one[0]), tuple(one[1])) for name, one in found.items()}


def graph_specs(values: Any) -> dict[str, TensorSpec]:
    """Inputs or outputs of an `onnx_ir` graph by name.

    Raises:
        ArtefactError: one has no type, or no known rank.
    """
    found = {}
    for value in values:
        if value.dtype is None or value.shape is None:
            raise ArtefactError(f"{value.name!r} of the graph has no type or no shape")
        sizes = (size if isinstance(size, int) else str(size) for size in value.shape)
        found[value.name] = TensorSpec(value.dtype.numpy(), tuple(sizes))
    return found


def variant_name(runtime: str) -> str:
    """A runtime with what the rewrites for it ask of the processor, e.g. `openvino-vnni`."""
    return f"{runtime}-vnni" if has_vnni() else runtime


def prepared_graph(path: Path, runtime: OnCpu) -> PreparedGraph:
    """A graph as a runtime takes it, without loading onnx or torch into this process.

    Args:
        path: the exported graph; its external data lie beside it.
        runtime: the one that is to run it.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    if "onnx_ir" in sys.modules:
        return prepare_in_process(path, runtime)
    try:
        key = _key(path, runtime)
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    found = _from_cache(key)
    return _from_child(path, runtime, key) if found is None else found


def keep_prepared(path: Path) -> None:
    """Leave a graph in the user's cache as the runtimes of this machine take it, if that is possible.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    runtimes: tuple[OnCpu, ...] = ("onnxruntime", "openvino")
    for runtime in runtimes:
        with tempfile.TemporaryDirectory(prefix="trtq-graph-") as name:
            _write(Path(name), prepare_in_process(path, runtime))
            _keep(_key(path, runtime), Path(name))


def prepare_in_process(path: Path, runtime: OnCpu) -> PreparedGraph:
    """The same, by the rewrites themselves; imports onnx_ir and torch.

    Raises:
        ArtefactError: the graph cannot be read or rewritten.
    """
    import onnx_ir as ir

    from trtq.graph.runtimes.prepare import load_graph, prepare

    model = prepare(load_graph(path), runtime)
    graph = model.graph
    inputs, outputs = graph_specs(graph.inputs), graph_specs(graph.outputs)
    if runtime == "openvino":
        # Shapes of the general graph would contradict those that a session is given.
        for value in [*graph.outputs, *(value for node in graph for value in node.outputs)]:
            value.shape = None
        for value in graph.inputs:
            axes = range(len(inputs[value.name or ""].shape))
            value.shape = ir.Shape([f"{value.name}.{axis}" for axis in axes])
    try:
        serialized = ir.to_proto(model).SerializeToString()
    except Exception as err:  # protobuf's EncodeError has no public base.
        raise ArtefactError(f"cannot rewrite {path} for {runtime}: {_line(err)}") from err
    return PreparedGraph(serialized, inputs, outputs, dict(model.metadata_props))


def _key(path: Path, runtime: str) -> str:
    record = [sha256(path), variant_name(runtime), _runtime_version(), rewrites_id()]
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
    """SHA-256 of the text of everything that shapes a prepared graph, and of this module."""
    names = [*_PASSES.rglob("*.py"), Path(__file__)]
    texts = [f"{path.name} {sha256(path)}" for path in sorted(names)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _ours_alone(path: Path, kind: int) -> bool:
    """Whether only we can have written a file or folder."""
    found = path.lstat()
    owner = os.geteuid() if hasattr(os, "geteuid") else found.st_uid
    return (
        stat.S_IFMT(found.st_mode) == kind and found.st_uid == owner and not found.st_mode & 0o022
    )


def _from_cache(key: str) -> PreparedGraph | None:
    """What was kept, if it is what it was and nobody else can have put it there."""
    try:
        folder = cache_folder(_CACHE) / key
        files = folder / _GRAPH_FILE, folder / _RECORD_FILE
        if not all(_ours_alone(place, stat.S_IFDIR) for place in (folder.parent, folder)):
            return None
        if not all(_ours_alone(file, stat.S_IFREG) for file in files):
            return None
        found = PreparedGraph.of_record(files[0].read_bytes(), json.loads(files[1].read_bytes()))
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.utime(folder)
    except (OSError, RuntimeError, ValueError, RecursionError):
        # RuntimeError: the user has no home, or wants no cache.
        return None
    return found


def _keep(key: str, scratch: Path) -> None:
    """Move a prepared graph into the cache, if that is possible; without it the next start is slower."""
    try:
        if (scratch / _GRAPH_FILE).stat().st_size > _MAX_BYTES:
            return
        cache = cache_folder(_CACHE)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours_alone(cache, stat.S_IFDIR):
            return
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except (OSError, RuntimeError):
        return
    try:
        for name in (_GRAPH_FILE, _RECORD_FILE):
            shutil.copyfile(scratch / name, partial / name)
            (partial / name).chmod(0o600)
        shutil.rmtree(cache / key, ignore_errors=True)
        partial.rename(cache / key)
        entries = sorted(cache.iterdir(), key=lambda entry: entry.lstat().st_mtime, reverse=True)
        for entry in entries[_KEPT:]:
            shutil.rmtree(entry, ignore_errors=True)
    except OSError:  # A full disk, or another process that does the same at this moment.
        shutil.rmtree(partial, ignore_errors=True)


def _from_child(path: Path, runtime: str, key: str) -> PreparedGraph:
    with tempfile.TemporaryDirectory(prefix="trtq-graph-") as name:
        scratch = Path(name)
        try:
            with lifeline() as stdin:
                done = subprocess.run(
                    worker_command(__name__, path.resolve(), runtime, scratch),
                    stdin=stdin,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    timeout=_SECONDS,
                )
        except subprocess.TimeoutExpired as err:
            raise ArtefactError(
                f"rewriting {path} for {runtime} took more than {_SECONDS:.0f} s and was ended"
            ) from err
        try:
            record = json.loads((scratch / _RECORD_FILE).read_bytes())
            if "error" in record:
                raise getattr(errors, record["error"])(record["message"])
            found = PreparedGraph.of_record((scratch / _GRAPH_FILE).read_bytes(), record)
        except (OSError, ValueError) as err:
            if isinstance(err, TrtqError):
                raise
            raise ArtefactError(_why_it_died(path, done.returncode, done.stderr)) from err
        if found is None:
            raise ArtefactError(_why_it_died(path, done.returncode, done.stderr))
        _keep(key, scratch)
    return found


def _why_it_died(path: Path, code: int, said: str) -> str:
    last = last_words(said, _LAST_LINES)
    crash = crash_name(code)
    how = f"ended with code {code}" if crash is None else f"was ended by {crash}"
    return f"the process that rewrites {path} {how}; it said last: {last or 'nothing'}"


def _line(err: BaseException) -> str:
    return " ".join(str(err).split()) or type(err).__name__


def main() -> int:
    """In the child: a graph, the runtime and the folder that gets graph and record; 0 if all is well."""
    path, scratch = Path(sys.argv[1]), Path(sys.argv[3])
    runtime: OnCpu = "openvino" if sys.argv[2] == "openvino" else "onnxruntime"
    try:
        found = prepare_in_process(path, runtime)
    except TrtqError as err:
        record: dict[str, Any] = {"error": type(err).__name__, "message": str(err)}
    else:
        _write(scratch, found)
        return 0
    (scratch / _RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
    return 1


def _write(folder: Path, graph: PreparedGraph) -> None:
    (folder / _GRAPH_FILE).write_bytes(graph.model)
    (folder / _RECORD_FILE).write_text(json.dumps(graph.record()), encoding="utf-8")
