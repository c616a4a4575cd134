"""Comparison layer by layer: the first low-bit layer whose output leaves its bound."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtq.comparison.agreement import Flips
from trtq.comparison.bounds import OutputParity, call_bounds, output_parities
from trtq.comparison.call_set import CallSet
from trtq.comparison.flips import flips_of
from trtq.comparison.forms import Form, marked_form
from trtq.comparison.noise import noise_bound_db
from trtq.comparison.package import quiet_polygraphy
from trtq.comparison.result import ComparedLayer
from trtq.comparison.sides import Side, hold_same_numbers
from trtq.errors import UsageError
from trtq.exporter.parity import TIE_DB

__all__ = ["compare_layers"]

_MAX_IMAGES = 16
"""Images per call: enough that one or two with a flipped code are few."""


def compare_layers(sides: tuple[Side, Side], calls: CallSet) -> list[ComparedLayer]:
    """Mark the outputs of all low-bit layers on both sides, and compare them in every call.

    A layer of two forms of one run agrees to `TIE_DB` in every image without a flipped code, or as well
    as torch agrees with itself if last bits change. A low-bit layer and its float layer differ by the
    rounding noise of all layers up to it.

    Args:
        sides: the reference and the other side.
        calls: the calls; of a large image size only few images are taken.

    Returns:
        One entry per layer, in the order of execution.

    Raises:
        UsageError: a side is an engine, or the sides have no low-bit layer in common.
    """
    from polygraphy.comparator import Comparator

    names = [row.name for row in (sides[0].layers or sides[1].layers)]
    few = calls.few(_MAX_IMAGES)
    rows: dict[str, list[tuple[OutputParity, bool, int]]] = {}
    required: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="trtq-layers-") as scratch:
        forms = [
            marked_form(side, other, names, Path(scratch) / str(index))
            for index, (side, other) in enumerate((sides, sides[::-1]))
        ]
        common = [name for name in names if all(name in form.layers for form in forms)]
        if not common:
            raise UsageError(
                f"{sides[0].label} and {sides[1].label} have no low-bit layer in common; leave out "
                "--layers"
            )
        flips = _flips(sides, forms[0], few, common)
        with quiet_polygraphy():
            runners = [form.runner(few) for form in forms]
            for index, single in enumerate(
                Comparator.run(runners, data_loader=few.feeds, streaming=True)
            ):
                if not required:
                    order = [name for name in dict(single[0][1][0].items()) if name in common]
                    required = _required(sides, order)
                for parity, ok in _judged(single, few, index, required, flips):
                    rows.setdefault(parity.output, []).append((parity, ok, index))
    part = sides[0].part
    return [replace(_layer(name, rows[name], few), denoiser=part) for name in required]


def _flips(sides: tuple[Side, Side], reference: Form, calls: CallSet, layers: list[str]) -> Flips:
    """How many images may have a flipped code in a layer."""
    flips = flips_of(sides, calls, reference.denoiser, layers, half=_half(sides))
    return replace(flips, overall=flips.per_call)


def _half(sides: tuple[Side, Side]) -> bool:
    return any(side.opened.precision == "fp16" for side in sides)


def _required(sides: tuple[Side, Side], order: list[str]) -> dict[str, float]:
    """The required SNR of each layer, in the order of execution."""
    if hold_same_numbers(*sides):
        return dict.fromkeys(order, TIE_DB)
    noisy = {row.name: row for side in sides for row in side.layers}
    return {
        name: min(TIE_DB, noise_bound_db(noisy[earlier] for earlier in order[: place + 1]))
        for place, name in enumerate(order)
    }


def _judged(
    single: Any, calls: CallSet, index: int, required: Mapping[str, float], flips: Flips
) -> list[tuple[OutputParity, bool]]:
    """The agreement of every layer in one call, and polygraphy's verdict."""
    from polygraphy.comparator import Comparator

    from trtq.comparison.image_snr import ImageSnr, call_key

    expected, given = (
        {name: np.array(values[0][name]) for name in required} for _, values in single.items()
    )
    moved = flips.moved
    of_call = flips
    if moved is not None:
        of_call = replace(flips, moved=lambda _, pattern: moved(index, pattern))
    parities = output_parities(calls.only(index), [expected], [given], required, of_call)
    key = call_key(dict(single[0][1][0].items()))
    accuracy = Comparator.compare_accuracy(
        single, compare_func=ImageSnr(call_bounds(parities, [key]))
    )
    (verdicts,) = accuracy[0].values()
    return [(parity, bool(verdicts[0][parity.output])) for parity in parities]


def _layer(name: str, rows: list[tuple[OutputParity, bool, int]], calls: CallSet) -> ComparedLayer:
    """The call in which a layer is worst against its bound."""
    parity, _, index = min(rows, key=lambda row: row[0].row.db - row[0].bound.min_db)
    return ComparedLayer(
        name=name,
        snr_db=parity.row.db,
        required_db=parity.bound.min_db,
        timestep=calls.timesteps[index],
        ok=all(ok for _, ok, _ in rows),
    )
