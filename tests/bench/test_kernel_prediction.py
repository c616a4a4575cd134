"""The predicted times of the kernel benchmark, which are never a measurement."""

import json

import pytest

from trtq.bench.device import gpu_peak
from trtq.bench.kernel_operands import SHAPES, operations
from trtq.bench.kernel_prediction import GPUS, predict_kernels
from trtq.errors import UsageError


@pytest.mark.parametrize("architecture", GPUS)
def test_no_prediction_exceeds_the_peak(architecture):
    result = predict_kernels(architecture)
    assert result.predicted
    assert len(result.rows) == 3 * len(SHAPES)
    peak = gpu_peak(result.gpu, integers=True)
    assert peak is not None
    shapes = {shape.text: shape for shape in SHAPES}
    for row in result.rows:
        # Products of 4-bit integers have twice the rate of bytes.
        limit = peak.operations * (2 if row.form == "w4a4" else 1)
        rate = operations(shapes[row.shape]) / (row.product_microseconds * 1e-6)
        assert 0 < rate < limit
        assert row.quantise_microseconds > 0


def test_predictions_are_within_the_audit():
    """The geometric means that the audit of November 2026 predicts for these kernels, within 40 %."""
    audit = {"sm86": 4.1, "sm89": 3.7, "sm120": 3.8, "sm80": 1.5, "sm90": 0.73}
    for architecture, wanted in audit.items():
        mean = predict_kernels(architecture, ["w4a8"]).mean_speedup["w4a8"]
        assert 0.6 * wanted < mean < 1.1 * wanted


def test_architectures_and_forms_are_checked():
    with pytest.raises(
        UsageError, match=r"unknown architecture 'sm61'; choose from sm80, sm86, sm89"
    ):
        predict_kernels("sm61")
    with pytest.raises(UsageError, match="unknown form 'w1a1'"):
        predict_kernels("sm89", ["w1a1"])


def test_the_command_says_that_nothing_is_measured(tmp_path):
    from typer.testing import CliRunner

    from trtq.cli import app

    runner, file = CliRunner(), tmp_path / "prediction.json"
    shown = runner.invoke(app, ["bench", "kernels", "--predict", "sm89", "-o", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "not measured" in shown.output
    record = json.loads(file.read_text())
    assert record["predicted"] is True
    assert record["gpu"] == "GeForce RTX 4090"
    refused = runner.invoke(app, ["bench", "kernels", "--predict", "sm61"])
    assert refused.exit_code == 2
