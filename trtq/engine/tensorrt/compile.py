"""One graph to one engine, in a process of its own, or from the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from trtq.artefact.files import sha256
from trtq.engine.tensorrt.backends import CURRENT, Backend
from trtq.engine.tensorrt.job import NEEDS_PYTHON, Answer, Job
from trtq.errors import BuildError
from trtq.graph.file import ENGINE_FILE
from trtq.processes import crash_name, last_words, lifeline, was_killed, worker_command
from trtq.resources import available_bytes, cache_folder

__all__ = ["Compiled", "compile_engine", "estimated_peak_bytes"]

logger = logging.getLogger(__name__)

_ENTRY_FILE = "entry.json"
_CACHE = "engines"
_WORKER = "trtq.engine.tensorrt.worker"
_GIB = 1 << 30
_BASE_BYTES = 1 << 30
_BYTES_PER_GRAPH_BYTE = 4
"""Peak of TensorRT-RTX 1.7 per byte of the graph, with a margin: 3.9 GB of 0.9 GB and 6.2 GB of 1.7 GB,
Stable Diffusion 1.5's UNet in integers and in half precision."""
_LAST_LINES = 5
_PLUGINS = {"engine": "the engine itself, which needs no Python", "python": "this package"}


@dataclass(frozen=True)
class Compiled:
    """An engine that was built, or found in the cache.

    Attributes:
        answer: how building it went.
        cached: whether it was found.
        engine_bytes: size of its file.
    """

    answer: Answer
    cached: bool
    engine_bytes: int


def estimated_peak_bytes(graph: Path) -> int:
    """Memory that building is likely to take."""
    size = sum(path.stat().st_size for path in graph.parent.iterdir() if path.is_file())
    return _BASE_BYTES + _BYTES_PER_GRAPH_BYTE * size


def compile_engine(backend: Backend, job: Job, *, use_cache: bool = True) -> Compiled:
    """Build the engine of a job, or copy it from the cache.

    Args:
        backend: whose module the job names.
        job: what to build; the graph's folder holds nothing but the graph.
        use_cache: look there first, and leave a copy there. Engines for the GPU that is there are never
            kept, since nothing says later which one it was.

    Raises:
        BuildError: the builder refused, crashed or was killed.
        OSError: the disk is full.
    """
    key = _key(backend, job) if use_cache and CURRENT not in job.architectures else None
    if key is not None:
        found = _from_cache(key, job.engine)
        if found is not None:
            return found
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
    """Of everything that shapes an engine: graph with its tables, builder, target, options."""
    record = json.loads(job.model_dump_json(exclude={"graph", "engine"}))
    record |= {"backend": backend.name, "version": backend.version}
    record["worker"] = sha256(Path(__file__).parent / "worker.py")
    record["graph"] = {
        path.name: sha256(path) for path in sorted(job.graph.parent.iterdir()) if path.is_file()
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _from_cache(key: str, engine: Path) -> Compiled | None:
    """Copy an engine out of the cache; an entry that is not what it was is thrown away."""
    try:
        folder = cache_folder(_CACHE) / key
        entry = json.loads((folder / _ENTRY_FILE).read_text())
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
    """Keep a copy, if that is possible: a full disk must not fail a build that is done."""
    try:
        folder = cache_folder(_CACHE) / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except (OSError, RuntimeError):  # RuntimeError: the user has no home.
        return
    try:
        shutil.copyfile(engine, partial / ENGINE_FILE)
        entry = {"answer": answer.model_dump(), "sha256": sha256(engine)}
        (partial / _ENTRY_FILE).write_text(json.dumps(entry))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)


def _run_worker(job: Job, free: int) -> Answer:
    with tempfile.TemporaryDirectory(prefix="trtq-build-") as scratch, lifeline() as stdin:
        folder = Path(scratch)
        job_file, answer_file = folder / "job.json", folder / "answer.json"
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        done = subprocess.run(
            worker_command(_WORKER, job_file, answer_file),
            stdin=stdin,
            env=_environment(job.module, folder),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        try:
            answer = Answer.model_validate_json(answer_file.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as err:
            raise BuildError(_why_it_died(job, done.returncode, done.stderr, free)) from err
    if answer.error is not None:
        at = f" at layer {answer.layer!r}" if answer.layer else ""
        raise BuildError(f"{job.module} cannot build {job.graph.name}{at}: {answer.error}")
    return answer


def _environment(module: str, folder: Path) -> dict[str, str]:
    """For TensorRT-RTX a library under the name it looks for: its package has only the numbered one."""
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
                except OSError:  # Where users may not make links.
                    shutil.copyfile(library, link)
    paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    return environment


def _why_it_died(job: Job, code: int, stderr: str, free: int) -> str:
    said = last_words(stderr, _LAST_LINES)
    if was_killed(code):
        return (
            "the builder was killed, most likely for want of memory: it needs about "
            f"{estimated_peak_bytes(job.graph) / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB were free"
        )
    name = crash_name(code)
    if name is not None:
        return (
            f"the builder of {job.module} crashed ({name}); `trtq verify` lists what it takes badly. It "
            f"said last: {said or 'nothing'}"
        )
    return f"the builder of {job.module} ended with code {code}: {said or 'it said nothing'}"
