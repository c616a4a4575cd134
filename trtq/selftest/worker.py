"""The child process of a stage: it runs the trials and writes its answer after each.

A trial that crashes the process is named in the answer as `current`, so the parent records it and starts
another child after it. So does a trial that fails in the driver: after some errors of CUDA a process
cannot use the GPU any more.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from trtq.child import error_record, write_answer
from trtq.errors import KernelError, MissingDependencyError, TrtqError
from trtq.selftest.private import without_names
from trtq.selftest.record import TrialRow
from trtq.selftest.trials import STAGES, Options, Outcome, SkippedError, Stage, Trial

__all__ = ["main"]

_MAX_TEXT = 400


def main() -> int:
    """Run a stage; the arguments are the job as JSON and the path of the answer."""
    job, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    stage = next(stage for stage in STAGES if stage.number == job["stage"])
    module = importlib.import_module(f"trtq.selftest.{stage.module}")
    options = Options(**job["options"])
    if job.get("required"):
        try:
            module.require(options)
        except TrtqError as err:
            write_answer(path, error_record(err))
            return 1
    trials = list(module.trials(options))
    names = [trial.name for trial in trials]
    first = 0 if job["after"] is None else names.index(job["after"]) + 1
    _run(stage, trials, first, path)
    return 0


def _run(stage: Stage, trials: list[Trial], first: int, path: Path) -> None:
    answer: dict[str, Any] = {"checks": [], "sections": {}, "total": len(trials), "done": False}
    for index, trial in enumerate(trials[first:], first):
        answer |= {"current": trial.name, "index": index}
        write_answer(path, answer)
        row, sections, lost = _outcome(stage, trial)
        answer["checks"].append(row.model_dump(mode="json"))
        for key, value in sections.items():
            if isinstance(value, list):
                answer["sections"].setdefault(key, []).extend(value)
            else:
                answer["sections"][key] = value
        if lost:
            write_answer(path, answer | {"lost": True})
            return
    write_answer(path, answer | {"current": None, "done": True})


def _outcome(stage: Stage, trial: Trial) -> tuple[TrialRow, dict[str, Any], bool]:
    """The row of a trial, its sections, and whether the process may have lost the GPU."""
    start, lost = time.monotonic(), False
    outcome, error, skipped = Outcome(), None, None
    try:
        outcome = trial.call() or outcome
        error = outcome.fault
    except (SkippedError, MissingDependencyError) as err:
        skipped = str(err)
    except Exception as err:  # Of any library; a trial never ends the command.
        text = " / ".join(str(err).split("\n")).strip()
        plain = isinstance(err, TrtqError | AssertionError) and text
        error = text if plain else f"{type(err).__name__}: {text}"
        lost = isinstance(err, KernelError)
    row = TrialRow(
        stage=stage.number,
        name=trial.name,
        ok=None if skipped is not None else error is None,
        seconds=round(time.monotonic() - start, 3),
        detail=_clean(dict(outcome.detail)),
        error=None if error is None else without_names(error)[:_MAX_TEXT],
        skipped=None if skipped is None else without_names(skipped)[:_MAX_TEXT],
    )
    return row, outcome.sections, lost


def _clean(value: Any) -> Any:
    """A value of JSON whose texts hold no names and no paths."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return without_names(value) if isinstance(value, str) else value
