"""Kernels as NVRTC's PTX, run on the CPU: the machine code's instructions, not their stand-ins.

`translate` turns PTX into C++, runtime.cpp runs it over the fibers of `tests.plugins.fibers` with the
semantics of the PTX ISA and checks every access; parse.py, arithmetic.py and memory.py say which part of
the ISA is covered. An instruction, modifier or directive without a rule is an error.

What this cannot show: ptxas's work, the order of memory beyond barriers, and time.
"""

from tests.plugins.ptx.emit import translate
from tests.plugins.ptx.parse import PtxError
from tests.plugins.ptx.runner import Builder, Program, PtxFault, PtxMachine, needs_ptx

__all__ = [
    "Builder",
    "Program",
    "PtxError",
    "PtxFault",
    "PtxMachine",
    "needs_ptx",
    "translate",
]
