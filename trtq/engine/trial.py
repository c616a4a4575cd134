"""A graph opened and called once by its runtime, in a process of its own.

Whatever the graph does there, crash, loop without end or take all memory, the process that asks gets one
line about it: the child has a limit of time and of memory, and ends with the one that started it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtq.engine.base import Engine, TensorSpec
from trtq.errors import ArtefactError, MissingDependencyError, TrtqError, UsageError
from trtq.processes import crash_name, last_words, lifeline, processors, was_killed, worker_command
from trtq.processor import VARIABLE
from trtq.resources import available_bytes

__all__ = ["TRIAL_SECONDS", "Trial", "try_graph"]

TRIAL_SECONDS = 300.0
"""For one graph, unless the user says otherwise; Stable Diffusion's UNet takes about 20 on two cores."""
_BASE_BYTES = 2 << 30
_BYTES_PER_FILE_BYTE = 16
"""Of memory: weights of four bits become float32, and runtimes keep them twice while they load."""
_MIN_BYTES = 1 << 30
_LAST_LINES = 3
_LONGEST = 400
_LONGEST_AXIS = 1 << 24
_THREADS = 4


@dataclass(frozen=True)
class Trial:
    """How it went.

    Attributes:
        problem: in one line; None: the graph was opened and called.
        inputs: of the graph, by name; empty where it cannot be opened.
        outputs: of the graph, by name.
        given: shapes that came out of the call, by name of the output.
    """

    problem: str | None
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def try_graph(
    path: Path, sizes: Mapping[str, int], provider: str = "cpu", seconds: float = TRIAL_SECONDS
) -> Trial:
    """Open a graph and call it once, in a process of its own; Ctrl-C ends that, too.

    Args:
        path: the graph, with its external data beside it.
        sizes: of free axes, by name.
        provider: `cpu` or `openvino`.
        seconds: after which it counts as a graph without end.

    Raises:
        UsageError: the provider is not there, or the limit is none.
    """
    if not 0 < seconds < 1e7:
        raise UsageError(f"the time limit must be a number of seconds above 0, got {seconds:g}")
    limit = _memory_limit(path)
    with tempfile.TemporaryDirectory(prefix="trtq-trial-") as name:
        answer, said = Path(name) / "answer.json", Path(name) / "stderr"
        job = {
            "path": str(path.resolve()),
            "provider": provider,
            "sizes": dict(sizes),
            "bytes": limit,
            "seconds": seconds,
        }
        command = worker_command(__name__, json.dumps(job), answer)
        # onnxruntime's own provider then opens the file itself, which it computes rightly everywhere.
        environment = os.environ | ({VARIABLE: "-vnni"} if provider == "cpu" else {})
        with lifeline() as stdin:
            with said.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,  # It may have children, and Ctrl-C is ours to handle.
                )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return Trial(
                    f"opening and calling it once took more than {seconds:g} s and was ended: the "
                    "graph never ends, or is too large for this machine (--timeout raises the limit)"
                )
            finally:
                _end(process)
        return _outcome(answer, code, said, limit, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it started, whether or not it has ended itself."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # It is gone; on macOS the second.
        pass
    process.wait()


def _memory_limit(path: Path) -> int:
    """What the child may take: in proportion to the graph's files, and not more than is free."""
    try:
        files = [file for file in path.parent.iterdir() if file.is_file()]
        needed = _BASE_BYTES + _BYTES_PER_FILE_BYTE * sum(file.stat().st_size for file in files)
    except OSError:
        needed = _BASE_BYTES
    free = available_bytes()
    return max(_MIN_BYTES, min(needed, free)) if free else needed


def _outcome(answer: Path, code: int, said: Path, limit: int, seconds: float) -> Trial:
    try:
        found = json.loads(answer.read_bytes())
    except (OSError, ValueError):
        return Trial(_why_it_died(code, said.read_text(errors="replace"), limit, seconds))
    if found.get("usage"):
        kind = MissingDependencyError if found["usage"] == "missing" else UsageError
        raise kind(found["problem"])
    problem = found["problem"]
    if problem is not None and any(word in problem for word in ("bad_alloc", "MemoryError")):
        problem = f"it needs more memory than its limit of {limit / (1 << 30):.1f} GiB: {problem}"
    inputs, outputs = (
        {name: TensorSpec(np.dtype(one[0]), tuple(one[1])) for name, one in found[key].items()}
        for key in ("inputs", "outputs")
    )
    given = {name: tuple(shape) for name, shape in found["given"].items()}
    return Trial(problem, inputs, outputs, given)


def _why_it_died(code: int, said: str, limit: int, seconds: float) -> str:
    last = last_words(said, _LAST_LINES)[:_LONGEST]
    memory = f"{limit / (1 << 30):.1f} GiB"
    if "bad_alloc" in said or "MemoryError" in said:
        return f"it needs more memory than its limit of {memory}"
    if was_killed(code):
        return f"its process was killed, most likely for want of memory (its limit is {memory})"
    if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
        return f"opening and calling it once took more than {seconds:g} s and was ended"
    crash = crash_name(code)
    how = f"ended with code {code}" if crash is None else f"crashed ({crash})"
    return f"the runtime {how} on it; it said last: {last or 'nothing'}"


def main() -> int:
    """In the child: the job and the answer's file; 0 if the graph was opened and called."""
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    _limit_this_process(job["bytes"], job["seconds"])
    found: dict[str, Any] = {"problem": None, "inputs": {}, "outputs": {}, "given": {}}
    try:
        _open_and_call(Path(job["path"]), job["provider"], job["sizes"], found)
    except UsageError as err:
        missing = isinstance(err, MissingDependencyError)
        found |= {"problem": _line(err), "usage": "missing" if missing else "other"}
    except TrtqError as err:
        found["problem"] = _line(err)
    except (Exception, MemoryError) as err:
        found["problem"] = f"{type(err).__name__}: {_line(err)}"
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.rename(answer)
    sys.stderr.flush()
    # Threads of the runtime may still be busy with what failed.
    os._exit(0 if found["problem"] is None else 1)


def _limit_this_process(size: int, seconds: float) -> None:
    """Memory, and time of the processor: should the one that started it die, it ends, too."""
    try:
        import resource
    except ImportError:  # Windows.
        return
    busy = int(seconds * (os.cpu_count() or 1)) + 5
    for which, most in ((resource.RLIMIT_DATA, size), (resource.RLIMIT_CPU, busy)):
        _, hard = resource.getrlimit(which)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(which, (wanted, hard))
        except (OSError, ValueError):
            logging.getLogger(__name__).warning("cannot limit the memory and time of the process")


def _open_and_call(
    path: Path, provider: str, sizes: Mapping[str, int], found: dict[str, Any]
) -> None:
    from trtq.engine.open import open_engine
    from trtq.engine.ort import open_session, session_options

    threads = min(_THREADS, processors())
    if not path.is_file():
        raise ArtefactError(f"{path} is no file")
    try:
        engine = open_engine(path, provider, threads)
    except ArtefactError:
        if provider == "cpu":
            # What the runtime says of the file itself is of more use than where a rewrite stopped.
            open_session(path, str(path), session_options(threads), provider, {})
        raise
    inputs, outputs = engine.inputs, engine.outputs
    found["inputs"], found["outputs"] = _plain(inputs), _plain(outputs)
    if not outputs:
        raise ArtefactError("it has no outputs")
    if not inputs:
        raise ArtefactError("it has no inputs")
    given = _called(engine, {name: _filled(name, spec, sizes) for name, spec in inputs.items()})
    found["given"] = {name: list(value.shape) for name, value in given.items()}


def _called(engine: Engine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = engine.run(feeds)
    for name, value in given.items():
        if not isinstance(value, np.ndarray):
            raise ArtefactError(f"its output {name!r} is no array")
    return given


def _filled(name: str, spec: TensorSpec, sizes: Mapping[str, int]) -> np.ndarray:
    """Ones, which are a label, a token, a mask, a timestep and an image alike."""
    shape: list[int] = []
    for axis in spec.shape:
        if isinstance(axis, int):
            shape.append(axis)
        elif axis in sizes:
            shape.append(sizes[axis])
        else:
            raise ArtefactError(
                f"its input {name!r} has a free axis {axis!r}, whose sizes are not known; known are "
                f"{', '.join(sizes) or 'none here'}"
            )
    if any(size <= 0 or size > _LONGEST_AXIS for size in shape):
        raise ArtefactError(f"its input {name!r} has the impossible shape {shape}")
    return np.ones(shape, spec.dtype)


def _plain(specs: Mapping[str, TensorSpec]) -> dict[str, Sequence[Any]]:
    return {name: [spec.dtype.name, list(spec.shape)] for name, spec in specs.items()}


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:_LONGEST] or type(err).__name__
