"""A worker process per row: answers, errors and crashes."""

from pathlib import Path

import pytest

from trtq.bench.process import Worker
from trtq.errors import MeasurementError, UsageError

MODULE = "tests.bench.echo_worker"


@pytest.fixture(autouse=True)
def tests_of_this_checkout(monkeypatch):
    """Import this `tests` package, not that of an installed distribution."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def worker():
    with Worker(MODULE, "a row") as process:
        yield process


def test_answers_are_separate_from_what_libraries_print(worker):
    assert worker.ask("add", left=1, right=2) == {"sum": 3}
    assert worker.ask("add", left=3, right=4) == {"sum": 7}


def test_errors_keep_their_class(worker):
    with pytest.raises(UsageError, match="no such thing"):
        worker.ask("refuse")
    with pytest.raises(MeasurementError, match="RuntimeError: out of luck"):
        worker.ask("fail")
    assert worker.ask("add", left=0, right=0) == {"sum": 0}


def test_a_process_that_exits_reports_its_code(worker):
    with pytest.raises(
        MeasurementError, match=r"a row: its process ended with code 3; .* farewell"
    ):
        worker.ask("leave")


def test_a_killed_process_is_reported(worker):
    with pytest.raises(MeasurementError, match="killed, most likely for want of memory"):
        worker.ask("die")
    with pytest.raises(MeasurementError, match="killed"):
        worker.ask("add", left=1, right=1)
    worker.close()  # The context closes it a second time.


def test_peak_memory_excludes_that_of_the_parent(worker):
    """Unlike with getrusage, memory of the parent process does not count."""
    ours = bytearray(1 << 28)
    with Worker(MODULE, "another row") as other:
        assert other.ask("memory")["peak"] < 1 << 28
    assert len(ours) == 1 << 28
