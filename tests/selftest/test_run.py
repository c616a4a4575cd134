"""The parent: what it records when children end early, and that it writes after each stage."""

from __future__ import annotations

import json
import re

import pytest

from trtq.errors import MissingDependencyError, UsageError
from trtq.progress import silent
from trtq.selftest import run as running
from trtq.selftest.integers import check_patterns
from trtq.selftest.record import TrialRow, read_selftest
from trtq.selftest.run import selftest
from trtq.selftest.summary import summary_lines
from trtq.selftest.trials import STAGES, Options, Outcome, SkippedError, Trial
from trtq.selftest.worker import _run

STAGE = STAGES[2]


def children(monkeypatch, names, crashing=(), losing=()):
    """Children that run named trials; some crash in a trial, some lose the GPU in it."""
    started = []

    def run_child(stage, options, after, progress):
        started.append(after)
        first = 0 if after is None else names.index(after) + 1
        answer = {"checks": [], "sections": {}, "total": len(names), "done": False}
        for index, name in enumerate(names[first:], first):
            answer |= {"current": name, "index": index}
            if name in crashing:
                return answer, "the process crashed (SIGSEGV); last output: none"
            row = TrialRow(stage=2, name=name, ok=name not in losing, seconds=0.1)
            answer["checks"].append(row.model_dump())
            answer["sections"] = {"rows": [*answer["sections"].get("rows", []), name]}
            if name in losing:
                return answer | {"lost": True}, "the process ended with code 0"
        return answer | {"current": None, "done": True}, "the process ended with code 0"

    monkeypatch.setattr(running, "_run_child", run_child)
    checks, sections = running._run_stage(STAGE, Options(), silent)
    return [(row.name, row.ok) for row in checks], sections.get("rows"), started


def test_after_a_crash_the_other_trials_run_in_a_new_process(monkeypatch):
    checks, rows, started = children(monkeypatch, list("abcd"), crashing="b")
    assert checks == [("a", True), ("b", False), ("c", True), ("d", True)]
    assert (rows, started) == (list("acd"), [None, "b"])


def test_after_a_lost_gpu_the_other_trials_run_in_a_new_process(monkeypatch):
    checks, _, started = children(monkeypatch, list("abcd"), losing="bd")
    assert checks == [("a", True), ("b", False), ("c", True), ("d", False)]
    assert started[:2] == [None, "b"]


def test_a_stage_whose_processes_all_end_early_is_given_up(monkeypatch):
    names = list("abcdefghij")
    checks, _, started = children(monkeypatch, names, crashing=names)
    assert len(started) == 6
    assert checks == [*((name, False) for name in "abcdef"), ("the rest of stage 2", False)]


def test_a_child_that_ends_before_its_first_trial_is_one_failure(monkeypatch):
    monkeypatch.setattr(running, "_run_child", lambda *_: ({}, "the process was killed"))
    checks, _ = running._run_stage(STAGE, Options(), silent)
    assert [(row.name, row.ok, row.error) for row in checks] == [
        ("stage 2", False, "the process was killed")
    ]


def test_the_file_is_rewritten_after_each_stage(monkeypatch, tmp_path):
    path, seen = tmp_path / "selftest.json", []

    def run_stage(stage, options, progress):
        if path.exists():
            seen.append((len(read_selftest(path).checks), read_selftest(path).complete))
        if stage.number == 2:
            raise KeyboardInterrupt
        return [TrialRow(stage=stage.number, name="x", ok=True, seconds=0.1)], {}

    monkeypatch.setattr(running, "_run_stage", run_stage)
    with pytest.raises(KeyboardInterrupt):
        selftest(path)
    assert seen == [(1, False), (2, False)]
    assert not read_selftest(path).complete
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match=r"exists; choose another --output or pass --overwrite"):
        selftest(path)


def test_nothing_raises_out_of_a_trial(tmp_path, monkeypatch):
    monkeypatch.setattr("trtq.selftest.private._names", lambda: (("arthur", "<user>"),))

    def skip():
        raise SkippedError("x is not installed: pip install x")

    def missing():
        raise MissingDependencyError("y is not installed: pip install y")

    trials = [
        Trial("detail", lambda: Outcome({"text": "/home/arthur/x.onnx", "n": [1, "of arthur"]})),
        Trial("nothing", lambda: None),
        Trial("fault", lambda: Outcome(fault="7 values differ")),
        Trial("skip", skip),
        Trial("missing", missing),
        Trial("error", lambda: 1 / 0),
        Trial("long", lambda: [][len("x" * 9)]),
    ]
    _run(STAGE, trials, 0, tmp_path / "answer.json")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["done"]
    rows = [(r["name"], r["ok"], r["error"], r["skipped"]) for r in answer["checks"]]
    assert rows == [
        ("detail", True, None, None),
        ("nothing", True, None, None),
        ("fault", False, "7 values differ", None),
        ("skip", None, None, "x is not installed: pip install x"),
        ("missing", None, None, "y is not installed: pip install y"),
        ("error", False, "ZeroDivisionError: division by zero", None),
        ("long", False, "IndexError: list index out of range", None),
    ]
    assert answer["checks"][0]["detail"] == {"text": "x.onnx", "n": [1, "of <user>"]}


def test_the_summary_is_short_and_says_what_failed_and_what_was_skipped():
    from tests.selftest.samples import sample

    failed = [
        TrialRow(stage=2, name=f"case {i}", ok=False, seconds=1, error="e" * 300) for i in range(9)
    ]
    lines = summary_lines(sample(checks=[*sample().checks, *failed]), "selftest.json")
    assert len(lines) <= 12
    text = "\n".join(lines)
    assert "2 integers: 1 passed, 9 failed, 10 s" in text
    assert "- skipped: pip install torch" in text
    assert text.count("! case") == 3
    assert "! and 6 more, see selftest.json" in text
    assert "9 of 11 failed" in text
    assert max(map(len, lines)) < 200
    assert re.search("attach selftest.json to an issue", lines[-1])


def test_every_pattern_must_name_a_case():
    check_patterns("tiles/w8a8*,tokens/w4a4")
    with pytest.raises(UsageError, match="no case has a name like 'tile/'"):
        check_patterns("tokens/*,tile/")
