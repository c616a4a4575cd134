"""Results of the public functions: attributes, JSON, and access by key for one release."""

import json
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import pytest

from trtq.results import OMITTED_IF_NONE, Result, json_key
from trtq.runs.result import FineTuneStage, RunResult


@dataclass(frozen=True, kw_only=True)
class Row(Result):
    name: str
    float_layers: int = field(metadata=json_key("float"))


@dataclass(frozen=True, kw_only=True)
class Whole(Result):
    rows: list[Row]
    by_name: dict[str, Row]
    interval: tuple[float, float]
    device: str | None
    note: str | None = field(default=None, metadata=OMITTED_IF_NONE)


@pytest.fixture
def whole():
    row = Row(name="unet", float_layers=3)
    return Whole(rows=[row], by_name={"unet": row}, interval=(1.0, 2.0), device=None)


def test_json_holds_plain_objects_under_the_keys_of_the_command_line(whole):
    row = {"name": "unet", "float": 3}
    expected = {"rows": [row], "by_name": {"unet": row}, "interval": [1.0, 2.0], "device": None}
    assert whole.to_json() == expected
    assert json.loads(json.dumps(whole.to_json())) == expected


def test_a_field_can_be_left_out_while_it_is_none(whole):
    assert "note" not in whole.to_json()
    noted = Whole(rows=[], by_name={}, interval=(0.0, 0.0), device=None, note="slow")
    assert noted.to_json()["note"] == "slow"


def test_results_cannot_be_changed(whole):
    with pytest.raises(FrozenInstanceError):
        whole.device = "cpu"


def test_deprecated_access_by_key_works_for_one_release():
    stage = FineTuneStage(name="fine-tune", seconds=1.0, iterations=2)
    sizes: dict[str, Any] = {"layers_quantized": 1, "layers_float": 2}
    result = RunResult(
        stages=[stage], bytes_before=8, bytes_after=4, seconds=0.5, peak_rss_bytes=1, **sizes
    )
    assert result["bytes_after"] == result.bytes_after == 4
    assert result["stages"][0]["iterations"] == 2
    assert "stages" in result
    assert "loras" not in result
    assert result.get("loras", "none") == "none"
    assert set(result.keys()) == set(dict(result)) == set(result.to_json())
    assert result
    with pytest.raises(KeyError, match="loras"):
        result["loras"]
