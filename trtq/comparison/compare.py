"""Comparison of any two artefacts by polygraphy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trtq.artefact.opened import Opened
from trtq.comparison.bisect import bisect as find_culprits
from trtq.comparison.calls import check_inputs, record_calls
from trtq.comparison.forms import side_form
from trtq.comparison.judge import judge
from trtq.comparison.layers import compare_layers
from trtq.comparison.package import check_polygraphy
from trtq.comparison.result import ComparedLayer, CompareResult
from trtq.comparison.script import check_folder, check_scriptable, write_results
from trtq.comparison.sides import Side, ordered_sides
from trtq.errors import UsageError
from trtq.progress import ProgressCallback, silent
from trtq.torch_settings import with_own_settings

__all__ = ["compare"]


@with_own_settings
def compare(
    artefact: str | Path | Opened,
    against: str | Path | Opened,
    *,
    provider: str | None = None,
    against_provider: str | None = None,
    layers: bool = False,
    bisect: bool = False,
    results: str | Path | None = None,
    script: str | Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> CompareResult:
    """Compare the predictions of two artefacts at every denoising step, by polygraphy.

    Args:
        artefact: a checkpoint, a run, an ONNX folder or engines, or one of them opened.
        against: another one, or the same ONNX folder on another provider.
        provider: what computes `artefact`, see `trtq.pipelines.open.open_any`; None: the default.
        against_provider: what computes `against`.
        layers: compare the output of every low-bit layer, too, and name the first that leaves its bound.
        bisect: if an output leaves its bound, find the low-bit layers that repair it in float.
        results: folder for the inputs, outputs and verdicts in polygraphy's JSON.
        script: folder for the same, the graph or engine, and a command of polygraphy that repeats the
            comparison without trtq.
        overwrite: whether to replace an earlier folder of this kind.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The agreement in every call; `ok` is False if an output leaves its bound.

    Raises:
        MissingDependencyError: polygraphy is missing or too old.
        UsageError: the two cannot be compared; the message names the difference.
        ArtefactError: an artefact is damaged.
    """
    check_polygraphy()
    sides = ordered_sides(artefact, against, (provider, against_provider))
    folders = _checked(sides[1], results, script, overwrite=overwrite)
    progress("record the calls", 0, 3)
    calls = record_calls(*sides)
    check_inputs(calls, sides)
    progress("compare", 1, 3)
    comparison = judge((side_form(sides[0]), side_form(sides[1])), calls)
    progress("compare", 2, 3)
    result = comparison.result()
    order = [row.name for row in (sides[0].layers or sides[1].layers)]
    if layers:
        rows = compare_layers(sides, calls)
        order = [row.name for row in rows]
        result = _with_layers(result, rows)
    if bisect:
        bisection = find_culprits(sides, calls, comparison, order, progress)
        result = replace(result, bisection=bisection)
    progress("compare", 3, 3)
    for folder, with_command in folders.items():
        written = write_results(folder, comparison, script=with_command, overwrite=overwrite)
        result = replace(result, folder=str(folder), files=written.files, command=written.command)
    return result


def _checked(
    other: Side, results: str | Path | None, script: str | Path | None, *, overwrite: bool
) -> dict[Path, bool]:
    """The output folders, and whether each gets a script.

    Raises:
        UsageError: a folder must not be replaced, both are one, or polygraphy cannot run the side.
    """
    wanted = [(results, False), (script, True)]
    folders = {
        check_folder(folder, overwrite=overwrite): with_command
        for folder, with_command in wanted
        if folder is not None
    }
    if len(folders) < sum(folder is not None for folder, _ in wanted):
        raise UsageError("--results and --script are one folder; --script writes the results, too")
    if script is not None:
        check_scriptable(other)
    return folders


def _with_layers(result: CompareResult, rows: list[ComparedLayer]) -> CompareResult:
    first = next((row.name for row in rows if not row.ok), None)
    return replace(result, ok=result.ok and first is None, layers=rows, first=first)
