"""Child processes: answers, errors, limits, and what the message about a dead one says."""

import signal
import sys

import pytest

from trtq import processes
from trtq.errors import GateError, TrtqError
from trtq.processes import Child, ChildDiedError, Exit, last_words

TRACE = 'Traceback (most recent call last):\n  File "x", line 1\n    f()\nOSError: too large\n'


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        ("\n \n", ""),
        ("one\ntwo\n\nthree\nfour\n", "two / three / four"),
        (TRACE, "OSError: too large"),
        ("a warning\n" + TRACE, "OSError: too large"),
    ],
)
def test_the_last_lines_are_one_and_a_traceback_is_its_last_line(stderr, words):
    assert last_words(stderr, 3) == words


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (3, "the builder ended with code 3; last output: boom"),
        (-11, "the builder crashed (SIGSEGV); see verify; last output: boom"),
        (-62, "the builder crashed (signal 62); see verify; last output: boom"),
        (0xC0000005, "the builder crashed (0xC0000005); see verify; last output: boom"),
        (
            -9,
            "the builder was killed, most likely because memory ran out: 3 GiB; last output: boom",
        ),
    ],
)
def test_how_a_process_died_is_one_line_on_every_system(code, message, monkeypatch):
    for system in ("posix", "windows"):
        if system == "windows":
            monkeypatch.delattr(signal, "SIGKILL")
        text = Exit(code, "boom\n").explain("the builder", memory=": 3 GiB", advice="; see verify")
        assert text == message
    assert Exit(3).explain("the builder").endswith("last output: none")


def child(monkeypatch, body):
    code = f"import json, sys, time\n{body}"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(processes, "worker_command", lambda _, *a: [*command, *map(str, a)])
    return Child("any.module")


def test_an_answer_is_a_file(monkeypatch):
    with child(monkeypatch, "json.dump({'x': 1}, open(sys.argv[1], 'w'))") as process:
        assert process.answer(60) == {"x": 1}


@pytest.mark.parametrize(
    ("name", "kind"), [("GateError", GateError), ("OSError", OSError), ("NoSuch", TrtqError)]
)
def test_errors_of_the_child_are_raised(name, kind, monkeypatch):
    body = f"json.dump({{'raised': {name!r}, 'message': 'only 3 dB'}}, open(sys.argv[1], 'w'))"
    with child(monkeypatch, body) as process, pytest.raises(kind, match="only 3 dB"):
        process.answer(60)


@pytest.mark.parametrize("content", ["", "[1]"], ids=["no json", "no object"])
def test_without_an_answer_the_child_has_died(content, monkeypatch):
    body = f"open(sys.argv[1], 'w').write({content!r}); sys.exit('farewell')"
    with child(monkeypatch, body) as process, pytest.raises(ChildDiedError, match="farewell") as e:
        process.answer(60)
    assert e.value.exit == Exit(1, "farewell\n")


def test_a_child_that_takes_too_long_is_ended(monkeypatch):
    with child(monkeypatch, "time.sleep(600)") as process, pytest.raises(TimeoutError):
        process.answer(0.1)
    assert process._process.returncode == -signal.SIGKILL
