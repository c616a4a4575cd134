"""Comparing with a former result."""

import json

import pytest

from trtq.bench.history import FORMAT_VERSION, compare, read_former
from trtq.errors import UsageError

DEVICE = {"cpu": "a processor", "threads": 2}


def result(turns, path="onnx"):
    part = {"turns": turns}
    row = {"path": path, "provider": "cpu", "measured": True}
    row["batches"] = [{"batch": 1, "parts": {"denoiser": part}}]
    return {"format_version": FORMAT_VERSION, "device": DEVICE, "date": "then", "rows": [row]}


def test_rows_are_compared_by_path_provider_batch_and_part():
    found = compare(result([1.0] * 6), result([2.0] * 6), "old.json")
    (row,) = found["rows"]
    assert (row["row"], row["batch"], row["part"]) == ("onnx@cpu", 1, "denoiser")
    assert (row["ratio"], row["verdict"]) == (0.5, "slower")
    assert found["missing"] == []
    assert compare(result([1.0]), result([1.0], "other"), "x")["missing"] == ["other@cpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "is no result of trtq bench"),
        ('{"rows": []}', "is no result of trtq bench"),
        (json.dumps(result([1.0]) | {"format_version": 9}), "format version 9"),
        (
            json.dumps(result([1.0]) | {"device": DEVICE | {"threads": 8}}),
            "with threads 8, here it is 2; only the same device compares",
        ),
    ],
)
def test_what_cannot_be_compared_with_is_refused(tmp_path, text, message):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_former(path, DEVICE)


def test_a_result_of_the_same_device_is_read(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result([1.0])))
    assert read_former(path, DEVICE)["date"] == "then"
    with pytest.raises(UsageError, match="cannot read"):
        read_former(tmp_path / "none.json", DEVICE)
