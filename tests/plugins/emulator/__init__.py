"""Run the CUDA kernels on the CPU, thread by thread; see ptx.cuh in this folder."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.plugins.fibers import FOLDER
from trtq.plugins.compile import sources
from trtq.plugins.launch import Launch
from trtq.plugins.variants import Variant
from trtq.selftest.suite import Operand

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="emulating kernels needs g++")
_FLAGS = ("-std=c++17", "-O2", "-mf16c", "-ffp-contract=off", "-fPIC", "-shared", "-w")


class HostMachine(ABC):
    """A machine of `trtq.selftest.suite` whose kernels run on the host's memory."""

    @abstractmethod
    def run(self, launch: Launch, seed: int, memory: Memory) -> None:
        """Run a launch with an order of threads; `memory` is what the kernel may use."""

    def compute(
        self,
        operands: Mapping[str, Operand],
        launches: Callable[[Mapping[str, int]], Sequence[Launch]],
        seed: int,
    ) -> np.ndarray:
        memory = Memory()
        placed = {
            name: memory.put(operand.values, name, writable=operand.writable)
            for name, operand in operands.items()
        }
        for launch in launches({name: array.ctypes.data for name, array in placed.items()}):
            self.run(launch, seed, memory)
        return placed["out"]


class Emulator(HostMachine):
    """Compiles each variant once, into a folder, and runs its launches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[Variant, ctypes.CDLL] = {}

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self.libraries:
            place = self.folder / str(variant)
            place.mkdir()
            for name, text in sources(variant.kernel).items():
                (place / name).write_text(text)
            shutil.copy(HERE / "ptx.cuh", place)
            main = place / "kernel.cpp"
            main.write_text(f'#include "kernel.cu"\nEMULATE({variant.kernel})\n')
            library = place / "kernel.so"
            macros = [f"-D{name}={value}" for name, value in variant.defines.items()]
            assert COMPILER is not None
            paths = [f"-I{FOLDER}", str(main), "-o", str(library)]
            subprocess.run([COMPILER, *_FLAGS, *macros, *paths], check=True)
            self.libraries[variant] = ctypes.CDLL(str(library))
        return self.libraries[variant]

    def run(self, launch: Launch, seed: int, memory: Memory | None = None) -> None:
        """Run a launch with an order of threads; `memory` is checked by its protected pages only."""
        arguments = (ctypes.c_void_p * len(launch.arguments))(
            *(ctypes.addressof(argument) for argument in launch.arguments)
        )
        library = self._library(launch.variant)
        assert library.emulate(arguments, *launch.grid, launch.threads, seed) == 0, (
            "threads wait for ever"
        )


class Memory:
    """Arrays that end at a protected page: an access beyond their end crashes the process.

    Attributes:
        arrays: name of each array, the array, and whether a kernel may write to it.
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self.arrays: list[tuple[str, np.ndarray, bool]] = []

    def put(
        self, values: np.ndarray, name: str = "memory", *, writable: bool = False
    ) -> np.ndarray:
        pages = -(-values.nbytes // mmap.PAGESIZE) + 1
        area = mmap.mmap(-1, pages * mmap.PAGESIZE)
        self._maps.append(area)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        guard = ctypes.c_void_p(address + (pages - 1) * mmap.PAGESIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        # As close to the end of the page as 16-byte alignment allows.
        start = (pages - 1) * mmap.PAGESIZE - -(-values.nbytes // 16) * 16
        placed = np.frombuffer(area, values.dtype, values.size, start).reshape(values.shape)
        placed[...] = values
        self.arrays.append((name, placed, writable))
        return placed
