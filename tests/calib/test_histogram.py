"""Histogram calibrators: nvidia-modelopt's results, the definition, and runs that use them."""

import json

import numpy as np
import pytest
import torch

import trtq
from tests.golden.modelopt_calibrators import BITS, GOLDEN, tensors
from trtq.calib import histogram
from trtq.calib.calibrators import Calibrator, parse_calibrator
from trtq.calib.histogram import StepHistograms, entropy_amax, mse_amax, percentile_amax
from trtq.calib.recipe import load_recipe
from trtq.errors import RecipeError
from trtq.runs.folder import open_run


def amax_of(batches, method, bits=BITS):
    histograms = StepHistograms(1)
    for batch in batches:
        histograms.add(0, torch.from_numpy(batch))
    return float(histograms.amax(parse_calibrator(method), bits))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["amax"]


@pytest.mark.parametrize("name", list(tensors()))
def test_percentile_equals_modelopt(golden, name):
    for method, expected in golden[name].items():
        if method != "entropy":
            assert amax_of(tensors()[name], method) == pytest.approx(expected, rel=1e-6)


# The others of a kind differ in the seed only.
@pytest.mark.parametrize("name", [name for name in tensors() if name.endswith(("0", "3"))])
def test_entropy_equals_modelopt(golden, name, monkeypatch):
    # modelopt never joins bins, of which "heavy 3" gets 13,347.
    monkeypatch.setattr(histogram, "_MAX_BINS", 1 << 20)
    expected = golden[name]["entropy"]
    assert amax_of(tensors()[name], "entropy") == pytest.approx(expected, rel=1e-6)


def test_mse_is_the_minimum_that_brute_force_finds():
    counts = np.bincount(
        np.minimum(np.abs(np.random.RandomState(0).randn(5000) * 60), 299).astype(int)
    )
    centres = np.arange(len(counts)) + 0.5

    def error(amax, levels):
        step = amax / levels
        return float(
            (counts * (np.clip(np.round(centres / step), 0, levels) * step - centres) ** 2).sum()
        )

    for bits in (8, 4):
        amax = mse_amax(counts, 1.0, bits)
        errors = {centre: error(centre, 2 ** (bits - 1) - 1) for centre in centres[128:]}
        assert errors[amax] == pytest.approx(min(errors.values()), rel=1e-9)


def test_bins_grow_with_the_values_and_keep_every_count():
    histograms = StepHistograms(1)
    random = np.random.RandomState(0)
    values = [random.rand(500).astype(np.float32) * scale for scale in (1, 3, 3.5, 100)]
    for part in values:
        histograms.add(0, torch.from_numpy(part))
    counts, width = histograms._counts[0], histograms._widths[0]
    assert counts.sum() == 2000
    assert 2048 <= len(counts) <= 8192
    joined = np.concatenate(values)
    assert width * len(counts) >= joined.max()
    # Half of the values are in the bins up to the median.
    assert percentile_amax(counts, width, 50.0) == pytest.approx(np.median(joined), abs=2 * width)


def test_each_step_has_a_range_of_its_own_and_zeros_have_none():
    histograms = StepHistograms(3)
    histograms.add(0, torch.linspace(0, 1, 5000))
    histograms.add(1, torch.linspace(-10, 10, 5000))
    histograms.add(2, torch.zeros(100))
    first, second, third = histograms.amax(Calibrator("percentile", 100.0), 8).tolist()
    assert first == pytest.approx(1, abs=1e-3)
    assert second == pytest.approx(10, abs=1e-2)
    assert third == float("inf")
    shared = StepHistograms(1)
    for step in range(3):
        shared.add(step, torch.full((10,), 1.0 + step))
    assert len(shared) == 1
    assert float(shared.amax(Calibrator("percentile", 100.0), 8)) == pytest.approx(3, abs=1e-2)


def test_a_histogram_of_few_bins_has_a_range():
    assert entropy_amax(np.array([5.0, 3.0, 1.0]), 0.5, 8) == pytest.approx(1.5)
    assert 0 < mse_amax(np.array([5.0, 3.0, 1.0]), 0.5, 4) <= 1.5


@pytest.mark.parametrize(
    "text", ["percentile:50", "percentile:100.5", "percentile:", "mse:3", "kl"]
)
def test_an_unknown_calibrator_is_refused(text):
    with pytest.raises(RecipeError, match="percentile:99"):
        load_recipe(None, {"method": "minmax", "calibration": {"activations": text}})


@pytest.mark.parametrize("activations", ["entropy", "output"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"format": "fp8"}, "finds ranges of integers"), ({"scales": "row"}, "scales='row'")],
)
def test_a_calibrator_without_effect_is_refused(settings, message, activations):
    recipe = {"method": "minmax", "calibration": {"activations": activations}} | settings
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, recipe)


@pytest.mark.parametrize("tables", ["per-step", "static"])
def test_a_percentile_clips_the_ranges_of_a_run(tables, tmp_path):
    def scales(activations):
        out = tmp_path / activations.replace(":", "-")
        recipe = {
            "method": "minmax",
            "bits": "w8a8",
            "steps": 3,
            "tables": tables,
            "smooth": False,
            "calibration": {"images": 2, "activations": activations},
        }
        trtq.quantize("digits", recipe, out)
        layers = open_run(out).stored.layers
        return {name: layer.activation.scale for name, layer in layers.items()}

    whole, clipped = scales("minmax"), scales("percentile:99")
    assert whole.keys() == clipped.keys()
    narrower = [bool((clipped[name] < 0.95 * whole[name]).all()) for name in whole]
    assert all(bool((clipped[name] <= whole[name] * 1.001).all()) for name in whole)
    assert sum(narrower) > len(narrower) / 2
