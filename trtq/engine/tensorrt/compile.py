"""Building the engine of one graph in a child process, or copying it from the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trtq.artefact.files import sha256
from trtq.engine.tensorrt.backends import CURRENT, Backend
from trtq.engine.tensorrt.job import NEEDS_PYTHON, Answer, Job
from trtq.errors import BuildError
from trtq.graph.file import ENGINE_FILE
from trtq.processes import Child, ChildDiedError, Exit
from trtq.resources import available_bytes, cache_folder

__all__ = ["Compiled", "compile_engine", "estimated_peak_bytes"]

logger = logging.getLogger(__name__)

_ENTRY_FILE = "entry.json"
_CACHE = "engines"
_WORKER = "trtq.engine.tensorrt.worker"
_GIB = 1 << 30
_BASE_BYTES = 1 << 30
_BYTES_PER_GRAPH_BYTE = 4
"""Peak memory of TensorRT-RTX 1.7 per byte of the graph, with a margin. Measured with Stable Diffusion
1.5's UNet: 3.9 GB for 0.9 GB in integers, 6.2 GB for 1.7 GB in half precision."""
_PLUGINS = {"engine": "the engine itself, which needs no Python", "python": "this package"}


@dataclass(frozen=True)
class Compiled:
    """An engine that was built or taken from the cache.

    Attributes:
        answer: result of the build.
        cached: whether the engine comes from the cache.
        engine_bytes: size of the engine's file, in bytes.
    """

    answer: Answer
    cached: bool
    engine_bytes: int


def estimated_peak_bytes(graph: Path) -> int:
    """Estimated peak memory of a build, in bytes."""
    size = sum(path.stat().st_size for path in graph.parent.iterdir() if path.is_file())
    return _BASE_BYTES + _BYTES_PER_GRAPH_BYTE * size


def compile_engine(backend: Backend, job: Job, *, use_cache: bool = True) -> Compiled:
    """Build the engine of a job, or copy it from the cache.

    Args:
        backend: builder of the engine.
        job: engine to build; the graph's folder contains only the graph.
        use_cache: whether to read and write the cache. Engines for the GPU of this machine are never
            cached, since they do not record the GPU.

    Returns:
        Measurements of the build, and whether the engine comes from the cache.

    Raises:
        BuildError: the builder refused the graph, crashed or was killed.
        OSError: the disk is full.
    """
    key = _key(backend, job) if use_cache and CURRENT not in job.architectures else None
    if key is not None:
        cached = _from_cache(key, job.engine)
        if cached is not None:
            return cached
    needed, free = estimated_peak_bytes(job.graph), available_bytes()
    if 0 < free < needed:
        logger.warning(
            "building %s is likely to take %.1f GiB, and %.1f GiB are free",
            job.engine.parent.name,
            needed / _GIB,
            free / _GIB,
        )
    answer = _run_worker(job, free)
    if answer.plugins is not None:
        logger.info(
            "plugins of %s are those of %s", job.engine.parent.name, _PLUGINS[answer.plugins]
        )
    for text in answer.warnings:
        if text.startswith(NEEDS_PYTHON):
            logger.warning("%s: %s", job.engine.parent.name, text)
    compiled = Compiled(answer, cached=False, engine_bytes=job.engine.stat().st_size)
    if key is not None:
        _to_cache(key, job.engine, answer)
    return compiled


def _key(backend: Backend, job: Job) -> str:
    """Hash of everything that affects an engine: graph, weights, builder, architectures, options."""
    record = json.loads(job.model_dump_json(exclude={"graph", "engine"}))
    record |= {"backend": backend.name, "version": backend.version}
    record["worker"] = [
        sha256(Path(__file__).parent / name) for name in ("worker.py", "precisions.py")
    ]
    record["graph"] = {
        path.name: sha256(path) for path in sorted(job.graph.parent.iterdir()) if path.is_file()
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _from_cache(key: str, engine: Path) -> Compiled | None:
    """Copy an engine out of the cache; a damaged entry is removed."""
    try:
        folder = cache_folder(_CACHE) / key
        entry = json.loads((folder / _ENTRY_FILE).read_text(encoding="utf-8"))
        answer = Answer.model_validate(entry["answer"])
        shutil.copyfile(folder / ENGINE_FILE, engine)
        whole = sha256(engine) == entry["sha256"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ValidationError):
        return None
    if not whole:
        engine.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Compiled(answer, cached=True, engine_bytes=engine.stat().st_size)


def _to_cache(key: str, engine: Path, answer: Answer) -> None:
    """Copy an engine to the cache if possible; a full disk must not fail a finished build."""
    try:
        folder = cache_folder(_CACHE) / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except (OSError, RuntimeError):  # RuntimeError: the user has no home.
        return
    try:
        shutil.copyfile(engine, partial / ENGINE_FILE)
        entry = {"answer": answer.model_dump(), "sha256": sha256(engine)}
        (partial / _ENTRY_FILE).write_text(json.dumps(entry), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)


def _run_worker(job: Job, free: int) -> Answer:
    with tempfile.TemporaryDirectory(prefix="trtq-build-") as scratch:
        folder = Path(scratch)
        job_file = folder / "job.json"
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        with Child(_WORKER, job_file, env=_environment(job.module, folder)) as child:
            try:
                answer = Answer.model_validate(child.answer())
            except ChildDiedError as err:
                raise BuildError(_explain(job, err.exit, free)) from err
            except ValidationError as err:
                raise BuildError(_explain(job, child.wait(), free)) from err
    if answer.error is not None:
        at = f" at layer {answer.layer!r}" if answer.layer else ""
        raise BuildError(f"{job.module} cannot build {job.graph.name}{at}: {answer.error}")
    return answer


def _environment(module: str, folder: Path) -> dict[str, str]:
    """Environment in which TensorRT-RTX finds its library by the name without a version number."""
    environment = dict(os.environ)
    libraries = importlib.util.find_spec(f"{module}_libs")
    if libraries is None or not libraries.submodule_search_locations:
        return environment
    for place in libraries.submodule_search_locations:
        for library in Path(place).glob("lib*.so.*"):
            link = folder / (library.name.partition(".so")[0] + ".so")
            if not link.exists():
                try:
                    link.symlink_to(library)
                except OSError:  # The user may not create links.
                    shutil.copyfile(library, link)
    paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    return environment


def _explain(job: Job, how: Exit, free: int) -> str:
    return how.explain(
        f"the builder of {job.module}",
        memory=f": it needs about {estimated_peak_bytes(job.graph) / _GIB:.1f} GiB, and "
        f"{free / _GIB:.1f} GiB were free",
        advice="; `trtq verify` lists what it does not support",
    )
