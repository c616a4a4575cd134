"""A driver library that records calls and rejects the calls that a real driver rejects.

It is `libcuda.so.1` on the library path of a child process, so everything above it is real:
cuda-bindings, NVRTC and our own code. libcuda.c in this folder documents its behaviour and its
environment variables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
COMPILER = shutil.which("gcc")
needs_recording = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or importlib.util.find_spec("cuda") is None,
    reason="the recording driver needs gcc, Linux and cuda-bindings",
)


@dataclass
class Record:
    """The calls and the output of a child process, and what each process has left at its end."""

    code: int
    stdout: str
    stderr: str
    calls: list[dict[str, Any]]
    ends: list[dict[str, Any]]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["call"] == name]

    @property
    def names(self) -> list[str]:
        return [call["call"] for call in self.calls]


class RecordingDriver:
    """A driver compiled once into a folder; each child process starts with a fresh state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "libcuda.so.1"
        assert COMPILER is not None
        flags = ("-std=c11", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-pthread")
        subprocess.run([COMPILER, *flags, str(HERE / "libcuda.c"), "-o", str(library)], check=True)

    def environment(self, log: Path | None = None, **settings: object) -> dict[str, str]:
        """The environment of a child process; lower-case settings get the prefix `RECORDING_`."""
        variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        paths = [str(self.folder), variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
        if log is not None:
            variables["RECORDING_LOG"] = str(log)
        for name, value in settings.items():
            variables[name if name.isupper() else f"RECORDING_{name.upper()}"] = str(value)
        return variables

    def command(self, arguments: list[str], **settings: object) -> Record:
        """Run a command with this driver and return its record."""
        log = self.folder / "calls.jsonl"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            arguments,
            env=self.environment(log, **settings),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines]
        calls = [row for row in rows if row["call"] != "end"]
        ends = [row for row in rows if row["call"] == "end"]
        return Record(done.returncode, done.stdout, done.stderr, calls, ends)

    def run(self, code: str, **settings: object) -> Record:
        """Run Python code that must succeed."""
        record = self.command([sys.executable, "-c", textwrap.dedent(code)], **settings)
        assert record.code == 0, record.stderr
        return record


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> RecordingDriver:
    return RecordingDriver(tmp_path_factory.mktemp("driver"))


def image(
    name: str, architecture: str, library: Path | None = None, properties: Sequence[int] = ()
) -> bytes:
    """The parts of a cubin that the driver reads: version, architecture and kernel name.

    Args:
        name: name of the kernel.
        architecture: architecture, e.g. `sm89`.
        library: library of the PTX runner that the driver starts; None: the kernel does nothing.
        properties: registers, local bytes, static shared bytes and blocks that the driver reports.
    """
    header = bytearray(64)
    header[:4], header[8] = b"\x7fELF", 8
    header[48:52] = (int(architecture.removeprefix("sm")) << 8).to_bytes(4, "little")
    text = name.encode() + b"\0"
    text += b"" if library is None else b"PTX-RUNNER:%s\0" % str(library).encode()
    text += b"PROPERTIES:%s\0" % ",".join(map(str, properties)).encode() if properties else b""
    # The file ends at the position of the section table.
    header[40:48] = (len(header) + len(text)).to_bytes(8, "little")
    return bytes(header) + text
