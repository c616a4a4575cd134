"""Builds translated kernels once per text, and runs launches on them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.plugins.emulator import Memory
from tests.plugins.fibers import FOLDER
from tests.plugins.ptx.emit import translate
from trtq.plugins.compile import ptx
from trtq.plugins.launch import Launch
from trtq.plugins.variants import Variant

__all__ = ["Builder", "PtxFault", "PtxMachine", "needs_ptx"]

_HERE = Path(__file__).parent
_COMPILER = shutil.which("g++")
_HAS_NVRTC = importlib.util.find_spec("cuda") is not None
needs_ptx = pytest.mark.skipif(
    _COMPILER is None or not _HAS_NVRTC, reason="running PTX needs g++ and NVRTC"
)
_FLAGS = ("-std=c++17", "-fPIC", "-w", "-ffp-contract=off", f"-I{_HERE}", f"-I{FOLDER}")


class PtxFault(AssertionError):
    """A kernel did what a GPU forbids or leaves open; the text says what and where."""


@cache
def _runtime_key() -> str:
    files = (_HERE / "device.h", _HERE / "runtime.cpp", FOLDER / "fibers.h")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


class Builder:
    """Libraries by the hash of their text, in a folder that several processes may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _compile(self, target: Path, arguments: list[str]) -> Path:
        with (self.folder / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partial = target.with_name(f"{target.name}.{os.getpid()}")
                assert _COMPILER is not None
                subprocess.run([_COMPILER, *_FLAGS, *arguments, "-o", str(partial)], check=True)
                partial.replace(target)
        return target

    def library(self, text: str) -> Path:
        """The library of a kernel.

        Args:
            text: PTX of the kernel.

        Raises:
            PtxError: the text has something that the runner does not know.
        """
        source = translate(text)
        runtime = self._compile(
            self.folder / f"runtime-{_runtime_key()}.o",
            ["-O2", "-c", str(_HERE / "runtime.cpp")],
        )
        digest = hashlib.sha256((source + _runtime_key()).encode()).hexdigest()[:24]
        place = self.folder / f"{digest}.cpp"
        if not place.exists():
            partial = place.with_name(f"{place.name}.{os.getpid()}")
            partial.write_text(source)
            partial.replace(place)
        return self._compile(
            self.folder / f"{digest}.so", ["-O1", "-shared", str(place), str(runtime)]
        )


class PtxMachine:
    """A GPU of one architecture whose kernels run on the CPU.

    Args:
        folder: folder for builds.
        architecture: architecture that NVRTC compiles for, e.g. `sm80`.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        self.builder = Builder(folder)
        self.architecture = architecture
        self.libraries: dict[Variant, ctypes.CDLL] = {}
        self.launches = 0

    def path(self, variant: Variant) -> Path:
        """The library of a variant."""
        return self.builder.library(ptx(variant, self.architecture).decode())

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self.libraries:
            library = ctypes.CDLL(str(self.path(variant)))
            library.ptx_fault.restype = ctypes.c_char_p
            library.ptx_allow.argtypes = [
                ctypes.c_char_p,
                ctypes.c_uint64,
                ctypes.c_uint64,
                ctypes.c_int,
            ]
            self.libraries[variant] = library
        return self.libraries[variant]

    def run(self, launch: Launch, seed: int, memory: Memory) -> None:
        """Run a launch.

        Args:
            launch: kernel, grid and arguments.
            seed: seed of the threads' order.
            memory: the only memory that the kernel may use.

        Raises:
            PtxFault: a thread breaks a rule; nothing after it has run.
        """
        library = self._library(launch.variant)
        count = ctypes.c_uint32.in_dll(library, "ptx_parameter_count").value
        sizes = list((ctypes.c_uint32 * count).in_dll(library, "ptx_parameters"))
        given = [ctypes.sizeof(argument) for argument in launch.arguments]
        if given != sizes:
            raise PtxFault(f"{launch.variant} takes arguments of {sizes} bytes, got {given}")
        library.ptx_forget()
        for name, array, writable in memory.arrays:
            library.ptx_allow(name.encode(), array.ctypes.data, array.nbytes, writable)
        arguments = (ctypes.c_void_p * count)(*map(ctypes.addressof, launch.arguments))
        self.launches += 1
        if library.ptx_run(arguments, *launch.grid, launch.threads, launch.shared_bytes, seed):
            raise PtxFault(f"{launch.variant}, {self.architecture}: {library.ptx_fault().decode()}")
