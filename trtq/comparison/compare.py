"""Comparison of any two artefacts by polygraphy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtq.artefact.opened import Opened
from trtq.comparison.bounds import Moved, OutputParity, call_bounds, output_parities
from trtq.comparison.calls import DenoiserCalls, check_inputs, record_calls, torch_call
from trtq.comparison.package import check_polygraphy, quiet_polygraphy
from trtq.comparison.result import ComparedCall, CompareResult
from trtq.comparison.sides import Side, hold_same_numbers, ordered_sides, required_db
from trtq.errors import NonFiniteError, UsageError
from trtq.exporter.parity import last_bit_moved
from trtq.progress import ProgressCallback, silent
from trtq.quant.formats import QUANTIZED_INPUTS
from trtq.torch_settings import with_own_settings

__all__ = ["Comparison", "compare", "run_sides"]


@with_own_settings
def compare(
    artefact: str | Path | Opened,
    against: str | Path | Opened,
    *,
    provider: str | None = None,
    against_provider: str | None = None,
    progress: ProgressCallback = silent,
) -> CompareResult:
    """Compare the predictions of two artefacts at every denoising step, by polygraphy.

    Args:
        artefact: a checkpoint, a run, an ONNX folder or engines, or one of them opened.
        against: another one, or the same ONNX folder on another provider.
        provider: what computes `artefact`, see `trtq.pipelines.open.open_any`; None: the default.
        against_provider: what computes `against`.
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
    progress("record the calls", 0, 3)
    calls = record_calls(*sides)
    check_inputs(calls, sides)
    progress("compare", 1, 3)
    comparison = run_sides(sides, calls)
    progress("compare", 3, 3)
    return comparison.result()


@dataclass(frozen=True)
class Comparison:
    """A comparison that was made.

    Attributes:
        sides: the reference and the other side.
        calls: the calls.
        results: outputs of both sides, polygraphy's `RunResults`.
        parities: agreement and bound of every output in every call.
        bounds: the bounds as `trtq.comparison.image_snr.ImageSnr` takes them.
        accuracy: polygraphy's `AccuracyResults`.
    """

    sides: tuple[Side, Side]
    calls: DenoiserCalls
    results: Any
    parities: list[OutputParity]
    bounds: dict[str, Any]
    accuracy: Any

    def result(self) -> CompareResult:
        """The comparison as a result of `trtq.compare`; the verdicts are polygraphy's."""
        (verdicts,) = self.accuracy[0].values()
        reference, other = self.sides
        rows = [
            ComparedCall(
                output=parity.output,
                timestep=self.calls.timesteps[parity.call],
                snr_db=parity.row.db,
                pooled_db=parity.row.pooled_db,
                required_db=parity.bound.min_db,
                ties=parity.row.ties,
                ok=bool(verdicts[parity.call][parity.output]),
            )
            for parity in self.parities
        ]
        return CompareResult(
            ok=bool(self.accuracy),
            reference=reference.label,
            other=other.label,
            same_numbers=hold_same_numbers(reference, other),
            snr_db_min=min(row.snr_db for row in rows),
            required_db=required_db(reference, other),
            calls=rows,
        )


def run_sides(sides: tuple[Side, Side], calls: DenoiserCalls) -> Comparison:
    """Run both sides by polygraphy, and compare their outputs.

    Args:
        sides: the reference and the other side.
        calls: the calls to make.

    Raises:
        NonFiniteError: an output is NaN or infinite.
        UsageError: the sides have no output in common.
    """
    from polygraphy.comparator import Comparator

    from trtq.comparison.image_snr import ImageSnr, call_key

    with quiet_polygraphy():
        runners = [_runner(side, calls) for side in sides]
        results = Comparator.run(runners, data_loader=calls.feeds)
    expected, given = ([dict(call.items()) for call in results[side.label]] for side in sides)
    _check_outputs(sides, expected, given)
    required = dict.fromkeys(expected[0], required_db(*sides))
    parities = output_parities(
        calls, expected, given, required, _floor(sides[0], calls), calls.channels
    )
    bounds = call_bounds(parities, [call_key(outputs) for outputs in expected])
    with quiet_polygraphy():
        accuracy = Comparator.compare_accuracy(results, compare_func=ImageSnr(bounds))
    return Comparison(sides, calls, results, parities, bounds, accuracy)


def _runner(side: Side, calls: DenoiserCalls) -> Any:
    from trtq.comparison.runners import TorchRunner, engine_runner

    if side.in_torch:
        call = torch_call(side.source.denoiser, calls.family)
        return TorchRunner(side.label, calls.inputs, call)
    return engine_runner(side.label, side.engine)


def _floor(reference: Side, calls: DenoiserCalls) -> Moved | None:
    """Function that measures how much the last bits of a low-bit run in torch move its outputs."""
    if not reference.in_torch:
        return None
    denoiser = reference.source.denoiser
    if not any(isinstance(module, QUANTIZED_INPUTS) for module in denoiser.modules()):
        return None
    call = torch_call(denoiser, calls.family)

    def moved(index: int) -> dict[str, np.ndarray]:
        with last_bit_moved(denoiser):
            return call(calls.feeds[index])

    return moved


def _check_outputs(
    sides: tuple[Side, Side],
    expected: Sequence[dict[str, np.ndarray]],
    given: Sequence[dict[str, np.ndarray]],
) -> None:
    """Raise unless both sides have finite outputs of the same name and shape.

    Raises:
        NonFiniteError: an output is NaN or infinite.
        UsageError: there is no common output, or one has another shape.
    """
    common = [name for name in expected[0] if name in given[0]]
    if not common:
        raise UsageError(
            f"nothing can be compared: {sides[0].label} has the output {', '.join(expected[0])}, and "
            f"{sides[1].label} has {', '.join(given[0])}; compare artefacts of one model"
        )
    for side, outputs in zip(sides, (expected, given), strict=True):
        for call in outputs:
            for name in common:
                if not np.isfinite(call[name]).all():
                    raise NonFiniteError(f"{side.label} gives NaN or infinity in {name!r}")
    for name in common:
        if expected[0][name].shape != given[0][name].shape:
            raise UsageError(
                f"nothing can be compared: {name!r} of {sides[0].label} has the shape "
                f"{list(expected[0][name].shape)}, that of {sides[1].label} "
                f"{list(given[0][name].shape)}; compare artefacts of one model"
            )
