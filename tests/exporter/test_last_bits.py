"""The floor of a parity: how well a low-bit model agrees with itself after changes in last bits."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.graph.test_low_bit_layers import TABLE, low_bit
from trtq.calls.form import CallForm
from trtq.calls.variations import VariedForm
from trtq.exporter import call_parity
from trtq.exporter.call_parity import form_parity
from trtq.exporter.export_calls import _highest_floor
from trtq.exporter.last_bits import last_bit_moved
from trtq.exporter.parity import StepParity
from trtq.quant.deployed import DeployedLayer
from trtq.snr import EXACT_DB

FORM = CallForm({"x": {"tensor": "x"}})


def inputs_of(layer, x, **options):
    """What the layer receives."""
    seen = []
    with last_bit_moved(nn.ModuleDict({"layer": layer}), **options):
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer(x, TABLE.index(501.0))
        handle.remove()
    return seen[0]


def test_patterns_change_the_last_bits_only_and_repeat():
    layer, x = DeployedLayer(low_bit((5, 32)), None), torch.randn(4, 32)
    patterns = [inputs_of(layer, x, pattern=pattern) for pattern in range(3)]
    for moved in patterns:
        relative = ((moved - x) / x).abs()
        assert 0 < float(relative.max()) < 2**-21
    assert not torch.equal(patterns[0], patterns[1])
    assert not torch.equal(patterns[1], patterns[2])
    assert torch.equal(patterns[2], inputs_of(layer, x, pattern=2))


class Flipping(nn.Module):
    """A model whose result changes by `errors[pattern]` inside `last_bit_moved`."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors
        self.pattern = None
        self.measured = []

    def forward(self, x):
        if self.pattern is None:
            return x
        self.measured.append(self.pattern)
        return x * (1 + self.errors[self.pattern])


@contextmanager
def moved_by_pattern(module, change, pattern):
    assert 2**-22 <= change <= 2**-20
    module.pattern = pattern
    yield
    module.pattern = None


@pytest.mark.parametrize(
    ("errors", "measured", "holds"),
    [
        ([0.02, 0, 0, 0], [0], True),
        ([0, 0, 0.02, 0], [0, 1, 2], True),
        ([0, 0, 0, 0], [0, 1, 2, 3], False),
    ],
    ids=["the first pattern flips", "the third flips", "none flips: an error of the export"],
)
def test_the_floor_is_the_lowest_of_several_patterns(errors, measured, holds, monkeypatch):
    monkeypatch.setattr(call_parity, "last_bit_moved", moved_by_pattern)
    module = Flipping(errors)

    class Graph(nn.Module):
        def forward(self, x):
            return x * 1.02

    form = VariedForm("unet", FORM, {"x": torch.ones(1, 4)})
    row = form_parity("unet", module, Graph(), form)
    assert module.measured == measured
    assert row.holds(40.0) == holds


@pytest.mark.parametrize(
    ("known", "measured", "floor"),
    [
        (36.0, [], 36.0),
        (44.0, [0], -20 * math.log10(0.02)),
        (EXACT_DB, [0], -20 * math.log10(0.02)),
    ],
    ids=["as well as other calls", "worse than other calls", "no other floor"],
)
def test_a_floor_of_other_calls_is_enough_for_an_agreement_that_reaches_it(
    known, measured, floor, monkeypatch
):
    monkeypatch.setattr(call_parity, "last_bit_moved", moved_by_pattern)
    module = Flipping([0.02, 0, 0, 0])

    class Graph(nn.Module):
        def forward(self, x):
            return x * 1.02

    form = VariedForm("unet", FORM, {"x": torch.ones(1, 4)})
    row = form_parity("unet", module, Graph(), form, known)
    assert module.measured == measured
    assert row.floor_db == pytest.approx(floor, abs=0.01)
    assert row.holds(40.0)


def test_the_known_floor_is_the_highest_that_was_measured():
    rows = [
        ("unet", StepParity(30, 30, 0, floor_db=31)),
        ("unet", StepParity(90, 90, 0)),
        ("unet", StepParity(20, 20, 0, floor_db=22)),
        ("other", StepParity(50, 50, 0, floor_db=51)),
        ("exact", StepParity(90, 90, 0)),
    ]
    assert _highest_floor("unet", rows) == 31
    assert _highest_floor("other", rows) == 51
    assert _highest_floor("exact", rows) == EXACT_DB
