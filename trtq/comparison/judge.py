"""One comparison by polygraphy: two forms, the calls, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtq.comparison.bounds import OutputParity, call_bounds, output_parities
from trtq.comparison.call_set import CallSet
from trtq.comparison.flips import flips_of
from trtq.comparison.forms import Form
from trtq.comparison.package import quiet_polygraphy
from trtq.comparison.result import ComparedCall, CompareResult
from trtq.comparison.sides import Side, hold_same_numbers, required_db
from trtq.errors import NonFiniteError, UsageError

__all__ = ["Comparison", "judge"]


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
    calls: CallSet
    results: Any
    parities: list[OutputParity]
    bounds: dict[str, Any]
    accuracy: Any

    @property
    def ok(self) -> bool:
        """Whether every output stays within its bound."""
        return bool(self.accuracy)

    @property
    def snr_db_min(self) -> float:
        """Minimum SNR of an output, in dB."""
        return min(parity.row.db for parity in self.parities)

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
                denoiser=reference.part,
            )
            for parity in self.parities
        ]
        return CompareResult(
            ok=self.ok,
            reference=reference.label,
            other=other.label,
            same_numbers=hold_same_numbers(reference, other),
            snr_db_min=self.snr_db_min,
            required_db=required_db(reference, other),
            calls=rows,
        )


def judge(forms: tuple[Form, Form], calls: CallSet, required: float | None = None) -> Comparison:
    """Run two forms by polygraphy, and compare their outputs.

    Args:
        forms: the reference and the other side.
        calls: the calls to make.
        required: required SNR of the prediction, in dB; None: see `required_db`.

    Raises:
        NonFiniteError: an output is NaN or infinite.
        UsageError: the sides have no output in common.
    """
    from polygraphy.comparator import Comparator

    from trtq.comparison.image_snr import ImageSnr, call_key

    sides = (forms[0].side, forms[1].side)
    with quiet_polygraphy():
        runners = [form.runner(calls) for form in forms]
        results = Comparator.run(runners, data_loader=calls.feeds)
    expected, given = ([dict(call.items()) for call in results[side.label]] for side in sides)
    _check_outputs(sides, expected, given)
    bound = required_db(*sides) if required is None else required
    parities = output_parities(
        calls,
        expected,
        given,
        dict.fromkeys(expected[0], bound),
        flips_of(sides, calls, forms[0].denoiser),
        calls.channels,
        # Of a result with several tensors, each holds one image, or belongs to another medium.
        whole=calls.few_images and len(expected[0]) > 1,
    )
    bounds = call_bounds(parities, [call_key(outputs) for outputs in expected])
    with quiet_polygraphy():
        accuracy = Comparator.compare_accuracy(results, compare_func=ImageSnr(bounds))
    return Comparison(sides, calls, results, parities, bounds, accuracy)


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
