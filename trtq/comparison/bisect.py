"""Bisection: the low-bit layers that have to be in float for the output to agree."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from trtq.artefact.opened import Checkpoint
from trtq.comparison.call_set import CallSet
from trtq.comparison.forms import Form, float_layers, side_form, structured, with_floats
from trtq.comparison.judge import Comparison, judge
from trtq.comparison.noise import noise_bound_db
from trtq.comparison.result import Bisection
from trtq.comparison.sides import Side, hold_same_numbers, required_db
from trtq.errors import UsageError
from trtq.exporter.step_check import PARITY_DB
from trtq.progress import ProgressCallback

__all__ = ["bisect"]

_MAX_IMAGES = 16
"""Images per call, since every comparison calls both sides at every step."""


def bisect(
    sides: tuple[Side, Side],
    calls: CallSet,
    comparison: Comparison,
    order: Sequence[str],
    progress: ProgressCallback,
) -> Bisection:
    """Find the low-bit layers whose turn to float repairs the output, by halving.

    Layers in float have the reference's weight on both sides, and no rounded input. The smallest number
    k of first layers whose turn repairs the output names layer k; with several wrong layers the search
    is repeated among those before it.

    Args:
        sides: the reference and the other side.
        calls: the calls.
        comparison: the comparison with all layers in low bits.
        order: the low-bit layers, in the order of execution.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        The layers, and the rule of a policy that keeps them in float.

    Raises:
        UsageError: neither side is in torch, or one is an engine.
    """
    if comparison.ok:
        return Bisection(layers=[], policy=None, snr_db=comparison.snr_db_min, comparisons=0)
    search = _Search(sides, calls.few(_MAX_IMAGES), list(order), progress)
    if search.with_float([]).ok:
        # With few images flips may explain what they do not explain in all of them.
        search = _Search(sides, calls, list(order), progress)
    whole = search.with_float(search.order)
    if not whole.ok:
        return Bisection(layers=[], policy=None, snr_db=whole.snr_db_min, comparisons=search.count)
    culprits: list[str] = []
    end = len(search.order)
    repaired = whole
    while True:
        # The output is repaired by the first `good` layers, and not by the first `bad` ones.
        bad, good = 0, end
        while good - bad > 1:
            middle = (bad + good) // 2
            if search.with_float([*search.order[:middle], *culprits]).ok:
                good = middle
            else:
                bad = middle
        culprits.insert(0, search.order[good - 1])
        repaired = search.with_float(culprits)
        end = good - 1
        if repaired.ok or end == 0:
            break
    return Bisection(
        layers=culprits,
        policy=_policy(culprits),
        snr_db=repaired.snr_db_min,
        comparisons=search.count,
    )


def _policy(layers: Sequence[str]) -> str:
    names = ", ".join(f'"{name}"' for name in layers)
    return (
        f'[[rule]]\nlayers = [{names}]\nbits = "float"\n'
        'reason = "its low-bit form spoils the output (trtq verify --bisect)"'
    )


@dataclass
class _Search:
    """The comparisons of one bisection.

    Attributes:
        sides: the reference and the other side.
        calls: the calls.
        order: the low-bit layers that both sides have, in the order of execution.
        progress: callback that receives the stage's name, the work done and the total.
        count: number of comparisons so far.
    """

    sides: tuple[Side, Side]
    calls: CallSet
    order: list[str]
    progress: ProgressCallback
    count: int = 0
    _floats: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        reference, other = self.sides
        donor = reference.torch_denoiser() if not reference.in_torch else None
        if reference.in_torch:
            donor = structured(reference, other)
        if donor is None:
            raise UsageError(
                "--bisect takes float layers from a run or a float model, and neither side is one; give "
                "--against RUN"
            )
        self._floats = float_layers(donor, self.order)
        self.order = [name for name in self.order if name in self._floats]

    def with_float(self, layers: Sequence[str]) -> Comparison:
        """The comparison with some layers in float on both sides."""
        self.count += 1
        self.progress("bisect", self.count, 0)
        floats = {name: self._floats[name] for name in layers}
        with tempfile.TemporaryDirectory(prefix="trtq-bisect-") as scratch:
            forms = [
                self._form(side, floats, Path(scratch) / str(index))
                for index, side in enumerate(self.sides)
            ]
            return judge((forms[0], forms[1]), self.calls, self._required(layers))

    def _form(self, side: Side, floats: dict[str, nn.Module], folder: Path) -> Form:
        form = side_form(side)
        return form if isinstance(side.opened, Checkpoint) else with_floats(form, floats, folder)

    def _required(self, layers: Sequence[str]) -> float:
        """Required SNR with some layers in float, in dB."""
        if hold_same_numbers(*self.sides):
            return required_db(*self.sides)
        left = [row for side in self.sides for row in side.layers if row.name not in set(layers)]
        return float(min(PARITY_DB["fp32"], noise_bound_db(left)))
