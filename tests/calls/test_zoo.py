"""Pipelines that people run go the whole way, without a class name in trtq.

`tests.calls.whole_way.measure` holds the checks. `make test` runs the fast ones, `make test-slow` all
others.
"""

import pytest

from tests.calls.whole_way import measure
from tests.calls.zoo import ZOO


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
