"""A worker process per row: answers, errors and crashes."""

from pathlib import Path

import pytest

from trtq.bench.process import Worker
from trtq.errors import MeasurementError, UsageError

MODULE = "tests.bench.echo_worker"


@pytest.fixture(autouse=True)
def these_tests(monkeypatch):
    """Make this package importable as `tests`, a name that other packages install, too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def worker():
    with Worker(MODULE, "a row") as process:
        yield process


def test_requests_are_answered_even_if_libraries_print(worker):
    assert worker.ask("add", left=1, right=2) == {"sum": 3}
    assert worker.ask("add", left=3, right=4) == {"sum": 7}


def test_errors_keep_their_class(worker):
    with pytest.raises(UsageError, match="no such thing"):
        worker.ask("refuse")
    with pytest.raises(MeasurementError, match="RuntimeError: out of luck"):
        worker.ask("fail")
    assert worker.ask("add", left=0, right=0) == {"sum": 0}


def test_the_error_reports_how_a_process_ended(worker):
    with pytest.raises(
        MeasurementError, match=r"a row: its process ended with code 3; .* farewell"
    ):
        worker.ask("leave")


def test_the_error_names_a_killed_process(worker):
    with pytest.raises(MeasurementError, match="killed, most likely because memory ran out"):
        worker.ask("die")
    with pytest.raises(MeasurementError, match="killed"):
        worker.ask("add", left=1, right=1)
    worker.close()  # The context manager closes it a second time.


def test_memory_is_counted_from_the_start_of_the_worker(worker):
    """Memory that this process used before is not counted, unlike in getrusage."""
    ours = bytearray(1 << 28)
    with Worker(MODULE, "another row") as other:
        assert other.ask("memory")["peak"] < 1 << 28
    assert len(ours) == 1 << 28
