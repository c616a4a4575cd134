"""A comparison as files of polygraphy, and as a command that repeats it without trtq."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.files import files_below
from trtq.artefact.folder import check_output, new_artefact
from trtq.artefact.listing import write_listing
from trtq.comparison.judge import Comparison
from trtq.comparison.package import quiet_polygraphy
from trtq.comparison.sides import Side
from trtq.errors import UsageError
from trtq.graph.file import ENGINE_FILE, MODEL_FILE, save_rewritten

__all__ = ["KIND", "Written", "check_folder", "check_scriptable", "write_results"]

KIND = "comparison"
INPUTS, RESULTS, REFERENCE = "inputs.json", "results.json", "reference.json"
ACCURACY, BOUNDS, COMPARE, COMMAND = "accuracy.json", "bounds.json", "compare.py", "run.sh"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
_COMPARE_FILE = Path(__file__).with_name("image_snr.py")
_HEAD = """#!/bin/sh
# {other} against {reference}, without trtq: pip install polygraphy onnxruntime
# reference.json holds the outputs of {reference} in the calls of inputs.json.
# Exit code 0: every output stays within its bound of bounds.json.
set -e
cd "$(dirname "$0")"
"""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: names of the files.
        command: polygraphy's command, to be run in the folder; None without a script.
    """

    files: list[str]
    command: str | None


def check_folder(folder: str | Path, *, overwrite: bool) -> Path:
    """Check the output folder before any long work; return its absolute path.

    Raises:
        UsageError: the folder contains something that must not be replaced.
    """
    return check_output(Path(folder), overwrite=overwrite, kind=KIND)


def check_scriptable(side: Side) -> None:
    """Raise unless polygraphy can run a side by itself.

    Raises:
        UsageError: torch computes the side.
    """
    if side.in_torch:
        raise UsageError(
            f"polygraphy does not run {side.label}; give --script an ONNX folder or engines on one side "
            "(trtq export RUN -o ONNX), or take --results"
        )


def write_results(
    folder: Path, comparisons: Mapping[str, Comparison], *, script: bool, overwrite: bool
) -> Written:
    """Write comparisons in polygraphy's own formats.

    Args:
        folder: output folder; `inputs.json` holds the calls, `results.json` the outputs of both sides
            (`RunResults`), `accuracy.json` the verdicts (`AccuracyResults`).
        comparisons: the comparisons by name; each gets a folder of this name if there are several.
        script: whether to write the graph or engine of the other side, too, and the command that repeats
            the comparison.
        overwrite: whether to replace an earlier folder of this kind.

    Returns:
        Names of the files, and polygraphy's command.

    Raises:
        UsageError: the folder exists, or polygraphy cannot run the other side.
        ArtefactError: the disk is full, or writing fails.
    """
    commands = []
    with new_artefact(folder, kind=KIND, overwrite=overwrite) as partial, quiet_polygraphy():
        for name, comparison in comparisons.items():
            here = partial if len(comparisons) == 1 else partial / name
            here.mkdir(exist_ok=True)
            command = _write_one(here, comparison, script=script)
            commands.append(command if here == partial else f"(cd {name} && {command})")
        text = " && ".join(commands) if script else None
        if text is not None:
            reference, other = next(iter(comparisons.values())).sides
            head = _HEAD.format(reference=reference.label, other=other.label)
            (partial / COMMAND).write_text(f"{head}{text}\n", encoding="utf-8")
        write_listing(partial, KIND)
        names = sorted(files_below(partial))
    return Written(names, text)


def _write_one(folder: Path, comparison: Comparison, *, script: bool) -> str:
    """Write one comparison; return its command, or "" without a script."""
    from polygraphy.json import save_json

    save_json(comparison.calls.feeds, str(folder / INPUTS))
    comparison.results.save(str(folder / RESULTS))
    comparison.accuracy.save(str(folder / ACCURACY))
    if not script:
        return ""
    other = comparison.sides[1]
    check_scriptable(other)
    only = type(comparison.results)([comparison.results[0]])
    only.save(str(folder / REFERENCE))
    text = json.dumps(comparison.bounds, indent=1) + "\n"
    (folder / BOUNDS).write_text(text, encoding="utf-8")
    shutil.copyfile(_COMPARE_FILE, folder / COMPARE)
    return _write_model(folder, other)


def _write_model(folder: Path, side: Side) -> str:
    """Write the graph, as trtq gives it to the runtime, or copy the engine; return the command."""
    if side.graph is None:
        shutil.copyfile(side.file, folder / ENGINE_FILE)
        before = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if side.provider == "tensorrt-rtx" else ""
        run = [ENGINE_FILE, "--model-type", "engine", "--trt"]
    else:
        _save_prepared(side, folder)
        before = ""
        run = [MODEL_FILE, "--onnxrt", "--providers", _PROVIDERS.get(side.provider, side.provider)]
        if side.provider == "openvino":
            # OpenVINO finds fewer of its own fusions after those of onnxruntime.
            run += ["--graph-optimization-level", "ORT_DISABLE_ALL"]
    words = ["polygraphy", "run", *run, "--load-inputs", INPUTS, "--load-outputs", REFERENCE]
    words += ["--compare-func-script", COMPARE]
    return before + shlex.join(words)


def _save_prepared(side: Side, folder: Path) -> None:
    from trtq.graph.runtimes.prepare import load_graph, prepare

    assert side.graph is not None
    runtime: Any = side.provider if side.provider in ("openvino", "tensorrt") else "onnxruntime"
    model = prepare(load_graph(side.graph), runtime)
    save_rewritten(model, folder)
