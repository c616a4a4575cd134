"""Fixtures of the benchmark tests."""

import pytest

from tests.bench.stub_worker import StubWorker


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr("trtq.bench.run.Worker", StubWorker)
    monkeypatch.setattr(StubWorker, "dying", {})
    monkeypatch.setattr(StubWorker, "on_gpu", set())
    return StubWorker
