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
from typing import Any

import pytest

from tests.plugins.emulator import HostMachine, Memory
from tests.plugins.fibers import FOLDER
from tests.plugins.ptx.emit import translate
from trtq.plugins.compile import ptx
from trtq.plugins.launch import Launch
from trtq.plugins.variants import Variant

__all__ = ["Builder", "Program", "PtxFault", "PtxMachine", "needs_ptx"]

_HERE = Path(__file__).parent
_COMPILER = shutil.which("g++")
_HAS_NVRTC = importlib.util.find_spec("cuda") is not None
needs_ptx = pytest.mark.skipif(
    _COMPILER is None or not _HAS_NVRTC, reason="running PTX needs g++ and NVRTC"
)
_FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=off", f"-I{_HERE}", f"-I{FOLDER}")
# A launch spends its time in runtime.cpp; optimising a kernel takes longer than it saves. Its frame has
# to fit the stack of a fiber.
_KERNEL_FLAGS = ("-O0", "-Werror=frame-larger-than=200000", "-shared")


class PtxFault(AssertionError):
    """A kernel did what a GPU forbids or leaves open; the text says what and where."""


@cache
def _runtime_key() -> str:
    files = (*sorted(_HERE.glob("*.h")), _HERE / "runtime.cpp", FOLDER / "fibers.h")
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
            self.folder / f"{digest}.so", [*_KERNEL_FLAGS, str(place), str(runtime)]
        )


class Program:
    """A kernel that is ready to run.

    Args:
        path: library that `Builder.library` returned.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.ptx_fault.restype = ctypes.c_char_p
        number = ctypes.c_uint64
        self._library.ptx_allow.argtypes = [ctypes.c_char_p, number, number, ctypes.c_int]
        count = ctypes.c_uint32.in_dll(self._library, "ptx_parameter_count").value
        self.sizes = list((ctypes.c_uint32 * count).in_dll(self._library, "ptx_parameters"))

    def run(
        self,
        arguments: tuple[Any, ...],
        memory: Memory,
        *,
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: int = 32,
        shared_bytes: int = 0,
        seed: int = 0,
    ) -> None:
        """Run all blocks.

        Args:
            arguments: ctypes values in the order of the parameters.
            memory: the only memory that the kernel may use.
            grid: number of blocks along x, y and z.
            threads: number of threads per block.
            shared_bytes: dynamic shared memory per block.
            seed: seed of the threads' order.

        Raises:
            PtxFault: a thread breaks a rule; nothing after it has run.
        """
        given = [ctypes.sizeof(argument) for argument in arguments]
        if given != self.sizes:
            raise PtxFault(f"the kernel takes arguments of {self.sizes} bytes, got {given}")
        self._library.ptx_forget()
        for name, array, writable in memory.arrays:
            self._library.ptx_allow(name.encode(), array.ctypes.data, array.nbytes, writable)
        values = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        if self._library.ptx_run(values, *grid, threads, shared_bytes, seed):
            raise PtxFault(self._library.ptx_fault().decode())


class PtxMachine(HostMachine):
    """A GPU of one architecture whose kernels run on the CPU.

    Args:
        folder: folder for builds.
        architecture: architecture that NVRTC compiles for, e.g. `sm80`.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        self.builder = Builder(folder)
        self.architecture = architecture
        self.programs: dict[Variant, Program] = {}
        self.launches = 0

    def path(self, variant: Variant) -> Path:
        """The library of a variant."""
        return self.builder.library(ptx(variant, self.architecture).decode())

    def run(self, launch: Launch, seed: int, memory: Memory) -> None:
        """Run a launch.

        Args:
            launch: kernel, grid and arguments.
            seed: seed of the threads' order.
            memory: the only memory that the kernel may use.

        Raises:
            PtxFault: a thread breaks a rule; nothing after it has run.
        """
        if launch.variant not in self.programs:
            self.programs[launch.variant] = Program(self.path(launch.variant))
        self.launches += 1
        try:
            self.programs[launch.variant].run(
                launch.arguments,
                memory,
                grid=launch.grid,
                threads=launch.threads,
                shared_bytes=launch.shared_bytes,
                seed=seed,
            )
        except PtxFault as err:
            raise PtxFault(f"{launch.variant}, {self.architecture}: {err}") from err
