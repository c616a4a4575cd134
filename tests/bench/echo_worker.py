"""A worker process for tests."""

import os
import signal
import sys

from trtq.bench.process import answer_questions
from trtq.errors import UsageError
from trtq.resources import peak_rss_bytes


def add(left, right):
    print("what a library says")  # noqa: T201
    os.write(1, b"and what its C code says\n")
    return {"sum": left + right}


def refuse():
    raise UsageError("no such thing")


def fail():
    raise RuntimeError("out of luck")


def leave():
    sys.stderr.write("farewell\n")
    sys.exit(3)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    answer_questions(
        {"add": add, "refuse": refuse, "fail": fail, "leave": leave, "die": die}
        | {"memory": lambda: {"peak": peak_rss_bytes()}}
    )
