"""What a stage consists of: trials, their outcomes, and the list of the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GUARD_BYTES", "STAGES", "Options", "Outcome", "SkippedError", "Stage", "Trial"]

GUARD_BYTES = 256
"""Bytes before and after each operand in stage 2; addresses of operands stay aligned."""


class SkippedError(Exception):
    """A trial cannot run here; the message says why, and which command installs what is missing."""


@dataclass
class Outcome:
    """What a trial gives.

    Attributes:
        detail: what it measured or counted.
        fault: the first thing that is wrong; None: it passed.
        sections: parts of the file: `machine`, and rows of `gpus`, `kernels` and `rows`.
    """

    detail: Mapping[str, object] = field(default_factory=dict)
    fault: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A part of a stage whose result is recorded.

    Attributes:
        name: name of the trial.
        call: what it does; an exception is recorded as its error.
    """

    name: str
    call: Callable[[], Outcome | None]


@dataclass(frozen=True)
class Options:
    """Options of the command that stages need.

    Attributes:
        device: CUDA's index of the GPU among the visible ones.
        cases: patterns for the names of stage 2's cases, separated by commas; None: all.
        guard_bytes: bytes before and after each operand of stage 2.
        scratch: folder for a stage's files, which its processes share.
    """

    device: int = 0
    cases: str | None = None
    guard_bytes: int = GUARD_BYTES
    scratch: str = ""


@dataclass(frozen=True)
class Stage:
    """A stage of the command.

    Attributes:
        number: number of the stage.
        name: its name.
        module: module with `trials(options)`, in this package.
        seconds: time limit.
        brief: whether `--quick` includes it.
    """

    number: int
    name: str
    module: str
    seconds: float
    brief: bool = False


STAGES = (
    Stage(0, "machine", "machine", 120, brief=True),
    Stage(1, "load", "loading", 1800, brief=True),
    Stage(2, "integers", "integers", 1800, brief=True),
    Stage(3, "operator of torch", "operator", 1200),
    Stage(4, "sanitizer", "sanitizer", 1800),
    Stage(5, "engines", "engines", 3600),
    Stage(6, "times", "times", 3600),
)
