"""Pipelines that people run go the whole way, without a class name in trtq.

`tests.calls.whole_way.measure` holds the checks. `make test` runs the fast ones, `make test-slow` all
others.
"""

import re

import pytest

from tests.calls import report
from tests.calls.whole_way import MAX_DIFFERENCE, MIN_PARITY_DB, MIN_PSNR_DB, measure
from tests.calls.zoo import ZOO

# diffusers warns about its own classes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def parameter(name):
    marks = () if ZOO[name].fast else (pytest.mark.slow,)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize(
    "name", [parameter(name) for name, case in ZOO.items() if not case.refused]
)
def test_a_pipeline_goes_the_whole_way(name, tmp_path):
    measure(ZOO[name], tmp_path)


@pytest.mark.parametrize("name", [parameter(name) for name, case in ZOO.items() if case.refused])
def test_a_pipeline_runs_low_bit_in_torch_and_the_export_says_why(name, tmp_path):
    assert measure(ZOO[name], tmp_path).refused


def test_the_page_of_pipelines_is_what_the_stored_results_give():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.stored())


def test_the_stored_results_are_of_pipelines_that_hold_every_bound():
    rows = report.stored()["rows"]
    assert rows.keys() <= ZOO.keys()
    for name, row in rows.items():
        assert row["title"] == ZOO[name].title
        assert row["psnr_db"] >= MIN_PSNR_DB
        if ZOO[name].refused:
            assert re.search(ZOO[name].refused, row["refused"])
        else:
            assert row["refused"] is None
            assert row["parity_db"] >= MIN_PARITY_DB or row["floor_db"] < MIN_PARITY_DB
            assert row["difference"] < MAX_DIFFERENCE


def test_a_pipeline_without_results_is_listed_as_not_measured():
    text = report.page({"date": "2026-01-01", "versions": {"torch": "2"}, "rows": {}})
    for case in ZOO.values():
        assert f"| {case.title} | not measured |" in text
    assert "0 of 0 pipelines go the whole way" in text
