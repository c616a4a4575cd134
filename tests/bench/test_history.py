"""Comparison with an earlier result."""

import json
from pathlib import Path

import pytest

from trtq.bench.history import FORMAT_VERSION, EarlierResult, check_same_run, compare, read_earlier
from trtq.errors import UsageError

DEVICE = {"cpu": "a processor", "threads": 2}


def result(turns=(1.0,) * 6, path="onnx", batches=(1,), **changes):
    """Create a result with one row, whose denoiser and images take `turns[i]` ms in round i."""
    timed = {"turns": list(turns)}
    row = {"path": path, "provider": "cpu", "bits": "w4a8", "device": "cpu", "measured": True}
    row |= {"load_seconds": 1.0, "build_seconds": None, "denoiser_bytes": 4_000_000}
    row |= {"memory": {"weights_bytes": 5_000_000, "peak_bytes": 9_000_000}}
    parts = {"parts": {"denoiser": timed}, "batch_of_images": timed}
    row |= {"batches": [{"batch": batch} | parts for batch in batches]} | changes
    run = {"format_version": FORMAT_VERSION, "device": DEVICE, "date": "then", "rows": [row]}
    return run | {"steps": 4, "guidance": 1.0, "model_class": "UNet", "shape": [1, 8, 8]}


def compared(old, new):
    return compare(EarlierResult.model_validate(old), new, "old.json")


def verdicts(old, new):
    """Verdict and ratio by name of the compared value."""
    rows = compared(old, new)["rows"]
    return {row["what"]: (row["verdict"], row["ratio"]) for row in rows}


def test_compares_every_value_of_a_row():
    changes = {"load_seconds": 2.0, "denoiser_bytes": 1_000_000}
    changes |= {"memory": {"weights_bytes": 5_000_000, "peak_bytes": 3_000_000, "gpu_bytes": 1}}
    assert verdicts(result(), result([2.0] * 6, **changes)) == {
        "denoiser": ("worse", 0.5),
        "whole images": ("worse", 0.5),
        "load": ("one value each", 0.5),
        "denoiser's files": ("better", 4.0),
        "weights": ("equal", 1.0),
        "peak memory": ("one value each", 3.0),
    }


def test_values_have_units():
    rows = compared(result(), result([4.0] * 6))["rows"]
    shown = {row["what"]: (row["unit"], row["before"], row["after"], row["batch"]) for row in rows}
    assert shown["denoiser"] == ("ms", 1.0, 4.0, 1)
    assert shown["whole images"] == ("images/s", 1000.0, 250.0, 1)
    assert shown["denoiser's files"] == ("MB", 4.0, 4.0, None)


def test_verdict_needs_a_difference_beyond_the_spread():
    assert verdicts(result(), result([0.5] * 6))["whole images"] == ("better", 2.0)
    assert verdicts(result(), result([2.0] * 3 + [0.5] * 3))["denoiser"][0] == "within the spread"
    assert verdicts(result([1.0] * 5), result([2.0] * 6))["denoiser"] == ("too few turns", 0.5)
    assert verdicts(result(), result(denoiser_bytes=5_000_000))["denoiser's files"][0] == "worse"
    nothing = {"weights_bytes": 0}
    assert verdicts(result(), result(memory=nothing))["weights"] == ("one value each", None)


def test_lists_rows_and_batches_of_only_one_result():
    assert compared(result(), result(path="other"))["missing"] == [
        "other@cpu: only now",
        "onnx@cpu: only then",
    ]
    assert compared(result(batches=(1, 4)), result(batches=(1, 2)))["missing"] == [
        "onnx@cpu, batch 2: only now",
        "onnx@cpu, batch 4: only then",
    ]
    gone = result(measured=False, batches=())
    assert compared(result(), gone)["missing"] == ["onnx@cpu: not measured now"]
    assert compared(gone, result())["missing"] == ["onnx@cpu: not measured then"]


def test_does_not_compare_rows_with_different_bits_or_device():
    comparison = compared(result(), result([2.0] * 6, bits="w8a8", device="gpu"))
    assert comparison["rows"] == []
    assert comparison["different"] == [
        "onnx@cpu: bits w4a8 then, w8a8 now, device cpu then, gpu now"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "is not a result of trtq bench"),
        ('{"rows": []}', "is not a result of trtq bench"),
        (json.dumps(result() | {"format_version": 1}), "format version 1"),
        (json.dumps(result() | {"device": []}), "device: Input should be a valid dictionary"),
        (json.dumps(result() | {"rows": [{}]}), r"rows\.0\.path: Field required"),
        (json.dumps(result() | {"rows": 3}), "rows: Input should be a valid list"),
        (json.dumps(result(turns=[])), r"parts\.denoiser\.turns: List should have at least 1"),
        (json.dumps(result(turns=[0.0])), r"turns\.0: Input should be greater than 0"),
        (json.dumps(result(turns=[float("inf")])), r"turns\.0: Input should be a finite number"),
        (json.dumps(result(memory=[])), r"rows\.0\.memory: Input should be a valid dict"),
        (
            json.dumps(result() | {"device": DEVICE | {"threads": 8}}),
            "with threads 8, this run has 2; only results of the same device are comparable",
        ),
    ],
)
def test_rejects_files_that_are_not_comparable(tmp_path, text, message):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_earlier(path, DEVICE)


def test_reads_a_result_of_the_same_device(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result()))
    assert read_earlier(path, DEVICE).date == "then"
    with pytest.raises(UsageError, match="cannot read"):
        read_earlier(tmp_path / "none.json", DEVICE)


@pytest.mark.parametrize(
    "changes", [{"steps": 5}, {"guidance": 2.0}, {"model_class": "DiT"}, {"shape": [1, 16, 16]}]
)
def test_rejects_a_different_model_size_or_sampling(changes):
    same = {"steps": 4, "guidance": 1.0, "model_class": "UNet", "shape": [1, 8, 8]}
    earlier = EarlierResult.model_validate(result())
    check_same_run(earlier, Path("old.json"), **same)
    with pytest.raises(
        UsageError, match="only results of the same model, size and sampling are comparable"
    ):
        check_same_run(earlier, Path("old.json"), **same | changes)
