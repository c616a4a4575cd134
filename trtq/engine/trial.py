"""Trial of a graph: a child process opens it and calls it once.

If the graph crashes its runtime, never ends or takes all memory, the parent receives one line about it:
the child has limits on time and memory, and ends with the parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtq.child import error_record, limit_resources, write_answer
from trtq.engine.base import Engine, TensorSpec, specs_from_json, specs_to_json
from trtq.errors import ArtefactError, TrtqError, UsageError
from trtq.processes import Child, ChildDiedError, Exit
from trtq.processor import VARIABLE, processors
from trtq.resources import available_bytes

__all__ = ["TRIAL_SECONDS", "Trial", "try_graph"]

TRIAL_SECONDS = 300.0
"""Default time limit for one graph, in seconds; Stable Diffusion's UNet takes about 20 on two cores."""
_BASE_BYTES = 2 << 30
_BYTES_PER_FILE_BYTE = 16
"""Bytes of memory per byte of the graph's files: 4-bit weights become float32, twice during loading."""
_MIN_BYTES = 1 << 30
_MAX_LENGTH = 400
_MAX_AXIS = 1 << 24
_THREADS = 4
_GIB = 1 << 30
_OUT_OF_MEMORY = ("bad_alloc", "MemoryError")


@dataclass(frozen=True)
class Trial:
    """Result of a trial.

    Attributes:
        problem: description of the failure, in one line; None: the graph was opened and called.
        inputs: inputs of the graph by name; empty if the graph cannot be opened.
        outputs: outputs of the graph by name.
        given: shapes of the returned arrays, by name of the output.
    """

    problem: str | None
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def try_graph(
    path: Path, sizes: Mapping[str, int], provider: str = "cpu", seconds: float = TRIAL_SECONDS
) -> Trial:
    """Open a graph and call it once in a child process, which Ctrl-C ends too.

    Args:
        path: file of the graph, in one folder with its external data.
        sizes: sizes of the free axes, by name.
        provider: `cpu` or `openvino`.
        seconds: time limit in seconds.

    Returns:
        The problem if there is one, and the inputs and outputs of the graph.

    Raises:
        UsageError: the provider is not installed, or the limit is not a positive number.
    """
    if not 0 < seconds < 1e7:
        raise UsageError(f"the time limit must be a number of seconds above 0, got {seconds:g}")
    limit = _memory_limit(path)
    job = {
        "path": str(path.resolve()),
        "provider": provider,
        "sizes": dict(sizes),
        "bytes": limit,
        "seconds": seconds,
    }
    # With this setting onnxruntime's CPU provider opens the file itself and computes it correctly.
    env = os.environ | ({VARIABLE: "-vnni"} if provider == "cpu" else {})
    # A new session, since the runtime may start more processes, and this process handles Ctrl-C.
    with Child(__name__, json.dumps(job), env=env, new_session=True) as child:
        try:
            return _outcome(child.answer(seconds), limit)
        except TimeoutError:
            return Trial(
                f"opening and calling it once took more than {seconds:g} s and was ended: the graph "
                "never ends, or is too large for this machine (--timeout raises the limit)"
            )
        except ChildDiedError as err:
            return Trial(_explain(err.exit, limit, seconds))


def _memory_limit(path: Path) -> int:
    """Memory limit in bytes: proportional to the graph's files, but at most the free memory."""
    try:
        files = [file for file in path.parent.iterdir() if file.is_file()]
        needed = _BASE_BYTES + _BYTES_PER_FILE_BYTE * sum(file.stat().st_size for file in files)
    except OSError:
        needed = _BASE_BYTES
    free = available_bytes()
    return max(_MIN_BYTES, min(needed, free)) if free else needed


def _outcome(answer: Mapping[str, Any], limit: int) -> Trial:
    problem = answer["problem"]
    if problem is not None and any(word in problem for word in _OUT_OF_MEMORY):
        problem = f"it needs more memory than its limit of {limit / _GIB:.1f} GiB: {problem}"
    inputs, outputs = (specs_from_json(answer[key]) for key in ("inputs", "outputs"))
    given = {name: tuple(shape) for name, shape in answer["given"].items()}
    return Trial(problem, inputs, outputs, given)


def _explain(how: Exit, limit: int, seconds: float) -> str:
    memory = f"{limit / _GIB:.1f} GiB"
    if any(word in how.stderr for word in _OUT_OF_MEMORY):
        return f"it needs more memory than its limit of {memory}"
    if hasattr(signal, "SIGXCPU") and how.code == -signal.SIGXCPU:
        return f"opening and calling it once took more than {seconds:g} s and was ended"
    memory = f" (its limit is {memory})"
    return how.explain("the runtime's process", memory=memory, max_length=_MAX_LENGTH)


def main() -> int:
    """Run in the child; arguments: job, answer's file. Return 0 if the graph was opened and called."""
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    limit_resources(job["bytes"], job["seconds"])
    result: dict[str, Any] = {"problem": None, "inputs": {}, "outputs": {}, "given": {}}
    try:
        _open_and_call(Path(job["path"]), job["provider"], job["sizes"], result)
    except UsageError as err:
        result |= {"problem": _line(err)} | error_record(err, _line(err))
    except TrtqError as err:
        result["problem"] = _line(err)
    except (Exception, MemoryError) as err:
        result["problem"] = f"{type(err).__name__}: {_line(err)}"
    write_answer(answer, result)
    sys.stderr.flush()
    # Threads of the runtime may still be busy with the failed call.
    os._exit(0 if result["problem"] is None else 1)


def _open_and_call(
    path: Path, provider: str, sizes: Mapping[str, int], result: dict[str, Any]
) -> None:
    from trtq.engine.open import open_engine
    from trtq.engine.ort import open_session, session_options

    threads = min(_THREADS, processors())
    if not path.is_file():
        raise ArtefactError(f"{path} is not a file")
    try:
        engine = open_engine(path, provider, threads)
    except ArtefactError:
        if provider == "cpu":
            # The runtime's error about the file is more useful than the traceback of a rewrite.
            open_session(path, str(path), session_options(threads), provider, {})
        raise
    inputs, outputs = engine.inputs, engine.outputs
    result["inputs"], result["outputs"] = specs_to_json(inputs), specs_to_json(outputs)
    if not outputs:
        raise ArtefactError("it has no outputs")
    if not inputs:
        raise ArtefactError("it has no inputs")
    given = _called(engine, {name: _filled(name, spec, sizes) for name, spec in inputs.items()})
    result["given"] = {name: list(value.shape) for name, value in given.items()}


def _called(engine: Engine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = engine.run(feeds)
    for name, value in given.items():
        if not isinstance(value, np.ndarray):
            raise ArtefactError(f"its output {name!r} is not an array")
    return given


def _filled(name: str, spec: TensorSpec, sizes: Mapping[str, int]) -> np.ndarray:
    """An array of ones, which are valid labels, tokens, masks, timesteps and images."""
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
    if any(size <= 0 or size > _MAX_AXIS for size in shape):
        raise ArtefactError(f"its input {name!r} has the impossible shape {shape}")
    return np.ones(shape, spec.dtype)


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:_MAX_LENGTH] or type(err).__name__
