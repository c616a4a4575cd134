"""What the benchmark of kernels says of a layer; the timing itself needs a GPU."""

import pytest
import torch

from trtq.bench.kernels import (
    FORMS,
    SHAPES,
    Shape,
    bench_kernels,
    draw_operands,
    expected,
    operations,
)
from trtq.errors import UsageError
from trtq.plugins.spec import Geometry

SMALL = (
    Shape("linear", (2, 7, 40), 24),
    Shape("conv", (2, 24, 9, 8), 16, Geometry((3, 3), (2, 2), (1, 1))),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.model)
def test_the_definition_that_kernels_are_held_to_is_the_operators(shape, form):
    operands = draw_operands(shape, form, torch.device("cpu"))
    assert len(operands.step.unique()) == 2
    assert torch.equal(operands.call(), expected(operands))


def test_operations_are_counted():
    assert operations(SMALL[0]) == 2 * 14 * 40 * 24
    assert operations(SMALL[1]) == 2 * 2 * 5 * 4 * 24 * 16 * 9
    linear = [shape for shape in SHAPES if shape.geometry is None]
    assert min(operations(shape) for shape in linear) > 1e9
    assert {shape.model for shape in SHAPES} == {"SD 1.5", "SDXL", "DiT-XL/2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_goes_without():
    with pytest.raises(UsageError, match="torch sees none here; `trtq plugins build`"):
        bench_kernels()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_every_value_is_the_definitions():
    found = bench_kernels(shapes=SMALL)
    assert [row["wrong_values"] for row in found["rows"]] == [0] * 6
