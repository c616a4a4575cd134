"""A change of the kernels' sources turns the suite on the PTX runner red."""

from __future__ import annotations

import pytest

from tests.conftest import shared
from tests.plugins.ptx import PtxFault, PtxMachine, needs_ptx
from tests.plugins.ptx.mutations import MUTATIONS
from trtq.plugins import compile as compiling
from trtq.selftest.cases import CHECKS

pytestmark = needs_ptx

FAST = {"rows of A exchanged", "no wait for copies", "high nibbles shifted by 3"}
NAMED = {f"{check.group}/{check}": check for check in CHECKS}


def _parameters():
    for mutation in MUTATIONS:
        marks = () if mutation.name in FAST else (pytest.mark.slow,)
        yield pytest.param(mutation, id=mutation.name, marks=marks)


def test_there_are_enough_mutations_and_each_changes_something():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
    for mutation in MUTATIONS:
        text = compiling.sources(mutation.kernel)[mutation.file]
        assert text.count(mutation.old) == 1, mutation.name
        assert mutation.old != mutation.new
        assert all(NAMED[name].runs_on(mutation.architecture) for name in mutation.checks)


@pytest.mark.parametrize("mutation", [*_parameters()])
def test_the_suite_finds_a_mutation(mutation, tmp_path_factory, monkeypatch):
    sources = compiling.sources

    def mutated(kernel):
        files = sources(kernel)
        if mutation.file in files and (kernel == mutation.kernel or mutation.file != "kernel.cu"):
            files[mutation.file] = files[mutation.file].replace(mutation.old, mutation.new)
        return files

    monkeypatch.setattr(compiling, "sources", mutated)
    machine = PtxMachine(shared(tmp_path_factory, "ptx", lambda _: None), mutation.architecture)
    failures = []
    for name in mutation.checks:
        try:
            NAMED[name].call(machine)
        except (AssertionError, PtxFault) as err:
            failures.append(f"{name}: {err}")
            break
    assert failures, f"none of {', '.join(mutation.checks)} finds it"
