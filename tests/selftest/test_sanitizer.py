"""Stage 4 with a stand-in for compute-sanitizer that reports what the test asks for."""

from __future__ import annotations

import json
import sys

import pytest

from trtq.selftest import sanitizer
from trtq.selftest.cases import CHECKS
from trtq.selftest.trials import Options, SkippedError

PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
job, answer = sys.argv[-2:]
assert sys.argv[1:3] == ["--tool", "memcheck"]
job = json.loads(job)
assert (job["stage"], job["options"]["guard_bytes"]) == (2, 0)
rows = json.loads(os.environ["ROWS"])
if rows is not None:
    Path(answer).write_text(json.dumps({{"checks": rows}}))
print(os.environ.get("TEXT", ""))
sys.exit(int(os.environ.get("CODE", "0")))
"""
GOOD = [{"name": "tokens/w4a4", "ok": True, "error": None}]


@pytest.fixture
def run(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def call(rows=GOOD, **settings):
        monkeypatch.setenv("ROWS", json.dumps(rows))
        for name, value in settings.items():
            monkeypatch.setenv(name.upper(), str(value))
        return sanitizer._run("memcheck", Options())

    return call


def test_a_clean_run_counts_its_cases(run):
    outcome = run()
    assert (outcome.fault, outcome.detail) == (None, {"cases": 1})


def test_reports_of_the_tool_are_quoted(run):
    text = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ write of size 2 bytes\n"
        "=========     at low_bit+0x1f0\n"
        "========= ERROR SUMMARY: 1 error\n"
    )
    outcome = run(text=text, code=66)
    assert outcome.fault == "Invalid __global__ write of size 2 bytes; ERROR SUMMARY: 1 error"


def test_a_wrong_case_and_a_tool_that_cannot_start_are_faults(run):
    bad = [{"name": "tokens/w4a4", "ok": False, "error": "first at channel 3"}]
    assert run(rows=bad).fault == "tokens/w4a4: first at channel 3"
    assert run(rows=None, text="no GPU\n", code=1).fault == "ended with code 1: no GPU"
    assert run(rows=[], text="nothing", code=0).fault == "ended with code 0: nothing"


def test_without_the_program_the_trial_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(SkippedError, match="pip install nvidia-cuda-sanitizer-api"):
        sanitizer._run("memcheck", Options())
    program = tmp_path / "nvidia" / "sanitizer" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch()
    assert sanitizer._program() == str(program)


def test_the_cases_are_cases_of_the_suite_on_every_architecture():
    named = {check.full_name: check for check in CHECKS}
    assert set(sanitizer.CASES) <= set(named)
    for architecture in ("sm75", "sm80", "sm89", "sm90", "sm120"):
        count = sum(named[name].runs_on(architecture) for name in sanitizer.CASES)
        assert count >= 7
