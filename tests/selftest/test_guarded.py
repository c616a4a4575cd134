"""What is checked around the launches of a case, with memory and launches of a fake GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from trtq.errors import KernelError
from trtq.selftest.guarded import GuardedGpu
from trtq.selftest.suite import Operand, WrongValueError


class FakeGpu:
    """Host memory as device memory."""

    stream = 7

    def __init__(self):
        self.blocks = {}

    def allocate(self, size):
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        del self.blocks[address]

    def upload(self, address, host):
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host, address):
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def wait(self):
        pass


OPERANDS = {
    "x": Operand(np.arange(6, dtype=np.float32)),
    "out": Operand(np.full((2, 3), np.nan, np.float16), writable=True),
    "codes": Operand(np.full(5, 0x5A, np.uint8), writable=True),
}


def computed(kernel, guard_bytes=256):
    """The output after one launch, which is a function of the operands' addresses."""
    gpu = FakeGpu()
    device = SimpleNamespace(start=lambda launch, stream: launch())
    machine = GuardedGpu(gpu, device, guard_bytes)
    try:
        return machine.compute(OPERANDS, lambda at: [lambda: kernel(at)], 0)
    finally:
        assert not gpu.blocks, "memory is left"


def put(address, *values):
    ctypes.memmove(address, bytes(values), len(values))


@pytest.mark.parametrize("guard_bytes", [0, 256])
def test_outputs_and_scratch_may_be_written(guard_bytes):
    def kernel(at):
        put(at["out"], *np.arange(6, dtype=np.float16).tobytes())
        put(at["codes"], 1, 2, 3, 4, 5)

    output = computed(kernel, guard_bytes)
    assert output.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert output.dtype == np.float16


@pytest.mark.parametrize(
    ("name", "offset", "where"),
    [
        ("out", -1, "first 1 bytes before the start of `out`, which has 12 bytes"),
        ("out", -256, "first 256 bytes before the start of `out`"),
        ("out", 12, "first 0 bytes after the end of `out`"),
        ("codes", 5, "first 0 bytes after the end of `codes`, which has 5 bytes"),
        ("codes", 5 + 255, "first 255 bytes after the end of `codes`"),
        ("x", 24, "first 0 bytes after the end of `x`"),
        ("x", 3, "first at byte 3 of `x`, which has 24 bytes"),
    ],
)
def test_a_write_outside_the_outputs_is_found_with_its_place(name, offset, where):
    def kernel(at):
        put(at["out"], *[0] * 12)
        put(at[name] + offset, 0x33)

    with pytest.raises(WrongValueError, match="a kernel wrote outside its outputs: 1 bytes") as err:
        computed(kernel)
    assert where in str(err.value)


def test_a_moving_result_is_found_with_both_values():
    runs = []

    def kernel(at):
        runs.append(1)
        values = np.zeros(6, np.float16)
        values[4] = len(runs)
        put(at["out"], *values.tobytes())

    with pytest.raises(WrongValueError, match=r"first at \(1, 1\) of \[2, 3\]: 1.0, then 2.0"):
        computed(kernel)


def test_an_output_that_is_not_written_stays_poisoned():
    assert np.isnan(computed(lambda at: None)).all()


def test_a_failed_launch_frees_the_memory_and_keeps_its_error():
    def kernel(at):
        raise KernelError("the GPU failed")

    with pytest.raises(KernelError, match="the GPU failed"):
        computed(kernel)
