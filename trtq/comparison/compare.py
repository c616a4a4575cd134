"""Comparison of any two artefacts by polygraphy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trtq.artefact.manifest_rows import LayerRow
from trtq.artefact.opened import Opened
from trtq.comparison.bisect import bisect as find_culprits
from trtq.comparison.calls import check_inputs, record_calls
from trtq.comparison.forms import side_form
from trtq.comparison.judge import judge
from trtq.comparison.layers import compare_layers
from trtq.comparison.package import check_polygraphy
from trtq.comparison.recorded_calls import Part, record_parts
from trtq.comparison.result import ComparedLayer, CompareResult, joined, joined_bisections
from trtq.comparison.script import check_folder, check_scriptable, write_results
from trtq.comparison.sides import Side, check_layered, ordered_sides
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
        UsageError: the two cannot be compared, or the layers of engines are asked for; the message names
            the difference, and what to compare instead.
        ArtefactError: an artefact is damaged.
    """
    check_polygraphy()
    sides = ordered_sides(artefact, against, (provider, against_provider))
    for option, wanted in (("--layers", layers), ("--bisect", bisect)):
        if wanted:
            check_layered(sides, option)
    folders = _checked(sides[1], results, script, overwrite=overwrite)
    progress("record the calls", 0, 3)
    parts = _parts(sides)
    progress("compare", 1, 3)
    comparisons = {
        part.name: judge((side_form(part.sides[0]), side_form(part.sides[1])), part.calls)
        for part in parts
    }
    progress("compare", 2, 3)
    result = joined([comparison.result() for comparison in comparisons.values()])
    orders = {part.name: [row.name for row in _low_bit(part)] for part in parts}
    if layers:
        rows = {part.name: compare_layers(part.sides, part.calls) for part in _layered(parts)}
        orders |= {name: [row.name for row in named] for name, named in rows.items()}
        result = _with_layers(result, [row for named in rows.values() for row in named])
    if bisect:
        bisections = [
            find_culprits(
                part.sides, part.calls, comparisons[part.name], orders[part.name], progress
            )
            for part in parts
        ]
        result = replace(result, bisection=joined_bisections(bisections))
    progress("compare", 3, 3)
    for folder, with_command in folders.items():
        written = write_results(folder, comparisons, script=with_command, overwrite=overwrite)
        result = replace(result, folder=str(folder), files=written.files, command=written.command)
    return result


def _parts(sides: tuple[Side, Side]) -> list[Part]:
    """The calls at which the sides are compared."""
    if sides[0].recorded:
        return record_parts(sides)
    calls = record_calls(*sides)
    check_inputs(calls, sides)
    return [Part("", sides, calls)]


def _low_bit(part: Part) -> list[LayerRow]:
    return part.sides[0].layers or part.sides[1].layers


def _layered(parts: list[Part]) -> list[Part]:
    """The parts with low-bit layers; all parts if none has one, for the message."""
    return [part for part in parts if _low_bit(part)] or parts


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
