"""`trtq doctor --advise`: every card has advice that agrees with what the build refuses."""

import json

import pytest

from tests.runs.test_weight_only_runs import invoke
from trtq.engine.advice import ADVISED, advise
from trtq.graph.runtimes.format_rules import MIN_ARCHITECTURE, capable

OPTIONS = {
    "INT4 weights": "--bits w4a16",
    "FP8": "--format fp8",
    "NVFP4": "--format nvfp4",
}


@pytest.mark.parametrize("architecture", ADVISED)
def test_every_card_has_one_row_for_each_format(architecture):
    rows = {row.option: row for row in advise(architecture).formats}
    assert set(rows) == {"--bits w8a8", "--bits w4a8", "--bits w4a4", *OPTIONS.values()}
    assert [row.suits for row in rows.values()].count("best") == 1
    assert next(iter(rows.values())).suits == "best"
    order = [("best", "good", "size", "no").index(row.suits) for row in rows.values()]
    assert order == sorted(order)
    assert all(row.why for row in rows.values())


@pytest.mark.parametrize("architecture", [name for name in ADVISED if name != "cpu"])
def test_a_format_that_the_build_refuses_is_not_advised(architecture):
    rows = {row.option: row.suits for row in advise(architecture).formats}
    for dtype, (name, _) in MIN_ARCHITECTURE.items():
        assert (rows[OPTIONS[name]] != "no") == capable(dtype, architecture)


def test_the_command_prints_a_table_or_json():
    code, out, _ = invoke("doctor", "--advise", "SM_89")
    assert code == 0
    assert "--format fp8" in out
    assert "RTX 40" in out
    code, out, _ = invoke("doctor", "--advise", "sm120", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["architecture"] == "sm120"
    assert record["formats"][0]["option"] == "--format nvfp4"


def test_an_unknown_card_is_refused_in_one_line():
    code, out, err = invoke("doctor", "--advise", "sm42")
    assert code == 2
    assert not out
    assert "no advice for 'sm42'; choose one of sm75" in " ".join(err.split())
