"""The parent: it starts a child for each stage, and rewrites the file after each stage."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import trtq
from trtq.artefact.locks import claim
from trtq.artefact.outputs import check_file
from trtq.errors import ArtefactError
from trtq.processes import Child
from trtq.progress import ProgressCallback, silent
from trtq.selftest.machine import commit
from trtq.selftest.private import without_names
from trtq.selftest.record import (
    GpuRow,
    KernelRow,
    SelftestFile,
    TimeRow,
    TrialRow,
    write_selftest,
)
from trtq.selftest.trials import STAGES, Options, Stage

__all__ = ["selftest"]

_WORKER = "trtq.selftest.worker"
_MAX_CHILDREN = 6
"""Maximum number of children of a stage: the first, and those after trials that ended their process."""
_POLL_S = 0.2


def selftest(
    output: str | Path,
    *,
    brief: bool = False,
    options: Options | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> SelftestFile:
    """Check and measure this machine's GPU, and write the file.

    Args:
        output: path of the file.
        brief: run the stages that `--quick` includes.
        options: GPU and cases.
        overwrite: whether an existing file may be replaced.
        progress: callback with the stage's name, the completed trials and the total.

    Returns:
        The content of the file.

    Raises:
        KernelError: there is no GPU, or no suitable driver; no file is written.
        UsageError: the output cannot be written, or the options are invalid.
        ArtefactError: writing fails.
    """
    options = options or Options()
    final = check_file(output, overwrite=overwrite)
    stages = [s for s in STAGES if s.brief or not brief]
    given = {
        "--quick": brief,
        f"--cases {options.cases}": options.cases is not None,
    }
    record = SelftestFile(
        trtq=trtq.__version__,
        commit=commit(),
        options=[name for name, value in given.items() if value],
    )
    with claim(final):
        for stage in stages:
            checks, sections = _run_stage(stage, options, progress)
            progress(f"stage {stage.number}, {stage.name}", len(checks), len(checks))
            record = _added(record, checks, sections)
            record = record.model_copy(update={"complete": stage is stages[-1]})
            write_selftest(final, record)
    return record


def _added(
    record: SelftestFile, checks: list[TrialRow], sections: Mapping[str, Any]
) -> SelftestFile:
    update = {
        "checks": [*record.checks, *checks],
        "machine": record.machine | sections.get("machine", {}),
    }
    kinds: dict[str, Any] = {"gpus": GpuRow, "kernels": KernelRow, "rows": TimeRow}
    for key, kind in kinds.items():
        rows = [kind.model_validate(row) for row in sections.get(key, [])]
        update[key] = [*getattr(record, key), *rows]
    return record.model_copy(update=update)


def _run_stage(
    stage: Stage, options: Options, progress: ProgressCallback
) -> tuple[list[TrialRow], dict[str, Any]]:
    """Run a stage in as many children as it needs, and return its rows and sections."""
    with tempfile.TemporaryDirectory(
        prefix="trtq-selftest-", ignore_cleanup_errors=True
    ) as scratch:
        return _run_children(stage, replace(options, scratch=scratch), progress)


def _run_children(
    stage: Stage, options: Options, progress: ProgressCallback
) -> tuple[list[TrialRow], dict[str, Any]]:
    checks: list[TrialRow] = []
    sections: dict[str, Any] = {}
    after = None
    for _ in range(_MAX_CHILDREN):
        answer, death = _run_child(stage, options, after, progress)
        checks += [TrialRow.model_validate(row) for row in answer.get("checks", [])]
        for key, value in answer.get("sections", {}).items():
            sections[key] = [*sections.get(key, []), *value] if isinstance(value, list) else value
        after = answer.get("current")
        if answer.get("done"):
            return checks, sections
        if not answer.get("lost"):
            name = after or f"stage {stage.number}"
            checks.append(_failure(stage, name, death))
            if after is None:
                return checks, sections
    left = answer["total"] - answer["index"] - 1
    if left:
        text = f"{left} trials after {after} did not run: {_MAX_CHILDREN} processes lost the GPU"
        checks.append(_failure(stage, f"the rest of stage {stage.number}", text))
    return checks, sections


def _failure(stage: Stage, name: str, error: str) -> TrialRow:
    text = without_names(error)[:400]
    return TrialRow(stage=stage.number, name=name, ok=False, seconds=0.0, error=text)


def _run_child(
    stage: Stage, options: Options, after: str | None, progress: ProgressCallback
) -> tuple[dict[str, Any], str]:
    """The last answer of a child, and how the child ended."""
    required = stage.number == 0 and after is None
    job = {
        "stage": stage.number,
        "options": asdict(options),
        "after": after,
        "required": required,
    }
    environment = dict(os.environ)
    if stage.number:
        environment["CUDA_VISIBLE_DEVICES"] = _visible(options.device)
    with Child(_WORKER, json.dumps(job), env=environment, new_session=True) as child:
        death = _wait(child, stage, lambda: _report(child.answer_file, stage, progress))
        answer = _read(child.answer_file)
        if required and "raised" in answer:
            child.answer()  # Raises the child's error.
    return answer, death


def _wait(child: Child, stage: Stage, poll: Callable[[], None]) -> str:
    """Wait for the end of a child, and say how it ended."""
    waited = 0.0
    while waited < stage.seconds:
        with suppress(TimeoutError):
            return child.wait(_POLL_S).explain("the process", max_length=200)
        waited += _POLL_S
        poll()
    return f"the process took more than {stage.seconds:g} s and was ended"


def _read(path: Path) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return answer


def _report(path: Path, stage: Stage, progress: ProgressCallback) -> None:
    answer = _read(path)
    if "index" in answer:
        progress(f"stage {stage.number}, {stage.name}", answer["index"], answer["total"])


def _visible(device: int) -> str:
    """`CUDA_VISIBLE_DEVICES` of a process that sees the chosen GPU only."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return str(device)
    names = seen.split(",")
    if device >= len(names):
        raise ArtefactError(f"CUDA_VISIBLE_DEVICES is {seen!r}, which has no GPU {device}")
    return names[device]
