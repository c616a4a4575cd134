"""Stage 2: the kernels' integers against the reference in numpy, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache, partial

from trtq.errors import UsageError
from trtq.plugins.device import Gpu, current_device
from trtq.selftest.cases import CHECKS, LARGE
from trtq.selftest.guarded import GuardedGpu
from trtq.selftest.suite import Check
from trtq.selftest.trials import Options, Trial

__all__ = ["check_patterns", "trials"]


@cache
def _machine(guard_bytes: int) -> GuardedGpu:
    """The GPU of this process, opened by the first case that needs it."""
    gpu = Gpu()
    return GuardedGpu(gpu, current_device(), guard_bytes)


def check_patterns(patterns: str) -> None:
    """Raise unless each of several patterns, separated by commas, names a case.

    Raises:
        UsageError: no case has such a name.
    """
    for pattern in patterns.split(","):
        if not any(_matches(check, pattern) for check in (*CHECKS, *LARGE)):
            raise UsageError(
                f"no case has a name like {pattern!r}; names are like {CHECKS[0].full_name!r}, and * "
                "stands for any text"
            )


def _matches(check: Check, patterns: str | None) -> bool:
    """Whether a case is wanted; None: every case is."""
    if patterns is None:
        return True
    return any(fnmatchcase(check.full_name, pattern) for pattern in patterns.split(","))


def trials(options: Options) -> Iterator[Trial]:
    """One trial per case that the GPU's architecture runs."""
    architecture = _machine(options.guard_bytes).device.architecture
    for check in (*CHECKS, *LARGE):
        if _matches(check, options.cases) and check.runs_on(architecture):
            yield Trial(check.full_name, partial(_run, check, options.guard_bytes))


def _run(check: Check, guard_bytes: int) -> None:
    check.call(_machine(guard_bytes))
