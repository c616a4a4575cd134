"""Stage 4: NVIDIA's compute-sanitizer over small cases of stage 2, where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from trtq.processes import last_words, worker_command
from trtq.selftest.trials import Options, Outcome, SkippedError, Trial

__all__ = ["CASES", "TOOLS", "trials"]

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = (
    *(
        "two launches/w8a8-odd-nhwc",
        "two launches/w4a8-groups-nchw",
        "two launches/native-3x3-nhwc",
    ),
    *("tiles/w8a8-128x128-1", "tiles/w4a8-128x128-2", "tiles/native-128x128-3"),
    *("splits/w8a8-odd-64-3", "splits/w4a8-3x3-128-3", "fused/half-w4a8-odd-nchw"),
    *("two stages/w8a8-3", "tokens/w4a4", "outside/w8a8"),
)
"""Cases that run under each tool; an architecture runs those that it can."""
_NAME = "compute-sanitizer" + (".exe" if sys.platform == "win32" else "")
_SECONDS, _ERRORS_CODE = 420, 66
"""Time limit of a tool, and the exit code by which it reports errors of the kernels."""


def trials(options: Options) -> Iterator[Trial]:
    """One trial per tool."""
    for tool in TOOLS:
        yield Trial(tool, partial(_run, tool, options))


def _program() -> str:
    """The path of compute-sanitizer.

    Raises:
        SkippedError: it is not installed.
    """
    on_path = shutil.which(_NAME)
    if on_path is not None:
        return on_path
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    programs = sorted(packages.glob(f"**/{_NAME}")) if packages.is_dir() else []
    if not programs:
        raise SkippedError(
            "compute-sanitizer is not installed: pip install nvidia-cuda-sanitizer-api"
        )
    return str(programs[-1])


def _run(tool: str, options: Options) -> Outcome:
    """Run the cases under a tool.

    Without guard bytes an access beyond an operand is beyond its allocation, which the tool reports.
    """
    job = {
        "stage": 2,
        "options": asdict(replace(options, cases=",".join(CASES), guard_bytes=0)),
        "after": None,
    }
    with tempfile.TemporaryDirectory(prefix="trtq-sanitizer-") as folder:
        answer = Path(folder) / "answer.json"
        command = [_program(), "--tool", tool, "--target-processes", "all", "--print-limit", "3"]
        command += ["--error-exitcode", str(_ERRORS_CODE)]
        command += worker_command("trtq.selftest.worker", json.dumps(job), answer)
        text, code = _finished(command)
        try:
            checks = json.loads(answer.read_bytes())["checks"]
        except (OSError, ValueError, KeyError):
            checks = []
    wrong = [row for row in checks if row["ok"] is False]
    if code == _ERRORS_CODE:
        return Outcome({"cases": len(checks)}, _summary(text))
    if code or not checks:
        return Outcome({"cases": len(checks)}, f"ended with code {code}: {last_words(text)}")
    if wrong:
        return Outcome({"cases": len(checks)}, f"{wrong[0]['name']}: {wrong[0]['error']}")
    return Outcome({"cases": len(checks)})


def _finished(command: list[str]) -> tuple[str, int]:
    """Output and exit code of a command whose standard input stays open until it ends."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        watch = threading.Timer(_SECONDS, process.kill)
        watch.start()
        try:
            # `communicate` would close the standard input first, which ends a child of trtq.
            text = process.stdout.read()
            return text, process.wait()
        finally:
            watch.cancel()


def _summary(text: str) -> str:
    """The tool's first report and its number of errors."""
    lines = [line.strip("= ").strip() for line in text.splitlines() if line.startswith("=====")]
    reports = [line for line in lines if re.match(r"(Invalid|Error|Race|Uninit|Barrier)", line)]
    count = [line for line in lines if "SUMMARY" in line]
    return "; ".join([*reports[:2], *count[:1]]) or "it reports errors"
