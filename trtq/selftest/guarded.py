"""A GPU as a machine of the suite: every operand lies between guard bytes, and every case runs twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trtq.errors import KernelError
from trtq.plugins.device import CudaDevice, Gpu
from trtq.plugins.launch import Launch
from trtq.selftest.layers import Array
from trtq.selftest.suite import Operand, WrongValueError
from trtq.selftest.trials import GUARD_BYTES

__all__ = ["GuardedGpu"]

_GUARD = 0xFF
"""Value of the guard bytes, NaN as float16 and float32: a read beyond an operand spoils the result."""


class GuardedGpu:
    """Runs launches on a GPU and checks the memory around and in the operands.

    Args:
        gpu: memory and stream.
        device: the device of the current context.
        guard_bytes: bytes before and after each operand, a multiple of 16.
    """

    def __init__(self, gpu: Gpu, device: CudaDevice, guard_bytes: int = GUARD_BYTES) -> None:
        self.gpu = gpu
        self.device = device
        self.guard_bytes = guard_bytes

    def compute(
        self,
        operands: Mapping[str, Operand],
        launches: Callable[[Mapping[str, int]], Sequence[Launch]],
        seed: int,
    ) -> Array:
        """Run launches twice on fresh memory and return the contents of the operand `out`.

        Arguments are those of `trtq.selftest.suite.Machine`; a GPU chooses the order of its threads.

        Raises:
            WrongValueError: the results differ, guard bytes are overwritten, or an operand that kernels
                only read has changed.
            KernelError: a kernel cannot be started, or the GPU failed.
        """
        first, second = (self._once(operands, launches) for _ in range(2))
        moving = np.flatnonzero(_bytes(first) != _bytes(second))
        if moving.size:
            at = int(moving[0]) // first.itemsize
            index = tuple(map(int, np.unravel_index(at, first.shape)))
            raise WrongValueError(
                f"the result moves: {moving.size} bytes differ between two runs, first at {index} of "
                f"{list(first.shape)}: {first[index]!s}, then {second[index]!s}"
            )
        return first

    def _once(
        self,
        operands: Mapping[str, Operand],
        launches: Callable[[Mapping[str, int]], Sequence[Launch]],
    ) -> Array:
        guard = self.guard_bytes
        sent = {name: _guarded(operand.values, guard) for name, operand in operands.items()}
        bases: dict[str, int] = {}
        try:
            for name, values in sent.items():
                bases[name] = self.gpu.allocate(values.nbytes)
                self.gpu.upload(bases[name], values)
            for launch in launches({name: base + guard for name, base in bases.items()}):
                self.device.start(launch, self.gpu.stream)
            received = {name: np.empty_like(values) for name, values in sent.items()}
            for name, values in received.items():
                self.gpu.download(values, bases[name])
            self.gpu.wait()
        finally:
            self._free(bases)
        for name, values in received.items():
            _check_memory(name, operands[name], sent[name], values, guard)
        out = operands["out"].values
        inside: Array = received["out"][guard : guard + out.nbytes]
        return inside.view(out.dtype).reshape(out.shape)

    def _free(self, bases: Mapping[str, int]) -> None:
        try:
            for base in bases.values():
                self.gpu.free(base)
        except KernelError:  # After a fault the context is lost; the error under way is the cause.
            return


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _guarded(values: Array, count: int) -> Array:
    """The bytes of an array between guard bytes."""
    guard = np.full(count, _GUARD, np.uint8)
    return np.concatenate([guard, _bytes(values), guard])


def _check_memory(name: str, operand: Operand, sent: Array, received: Array, guard: int) -> None:
    size = operand.values.nbytes
    changed = np.flatnonzero(sent != received)
    if operand.writable:
        changed = changed[(changed < guard) | (changed >= guard + size)]
    if not changed.size:
        return
    at = int(changed[0]) - guard
    if at < 0:
        where = f"{-at} bytes before the start of"
    elif at >= size:
        where = f"{at - size} bytes after the end of"
    else:
        where = f"at byte {at} of"
    raise WrongValueError(
        f"a kernel wrote outside its outputs: {changed.size} bytes, first {where} `{name}`, which has "
        f"{size} bytes"
    )
