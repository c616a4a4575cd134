"""Layers in the kernels' layout, and the torch operator that runs them."""

import numpy as np
import pytest
import torch

from trtq.errors import StepError, UsageError
from trtq.plugins.low_bit.op import flat_fields, low_bit, spec_from_flat
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.quant.deployed import DeployedLayer
from trtq.quant.geometry import ConvGeometry
from trtq.quant.kernel_form import KernelLayer, layer_tensors, packed_operands
from trtq.quant.packing import PackedWeight
from trtq.quant.tensors import ActivationTensors, LayerTensors

SAME = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def layer(bits, shape, zero_point):
    rng = np.random.default_rng(0)
    columns = (-1, *(1,) * (len(shape) - 1))
    scale = torch.tensor([0.5, 0.25, 2.0])
    weight = PackedWeight.of(
        torch.from_numpy(rng.integers(0, 2**bits, shape, dtype=np.uint8)),
        torch.from_numpy(rng.random(shape[0], np.float32)).reshape(columns),
        torch.tensor(zero_point).float().reshape(columns),
        bits,
    )
    activation = ActivationTensors(
        scale, 1 / scale, torch.tensor([-3, 0, -15]), torch.tensor([12, 15, 0]), 4
    )
    return LayerTensors(weight, activation, torch.randn(shape[0]))


@pytest.mark.parametrize(
    ("bits", "shape", "zero_point", "geometry"),
    [
        (4, (2, 40), [3, 15], None),
        (3, (2, 5, 3, 3), [0, 7], ConvGeometry((1, 1), (1, 1), (1, 1), 1)),
        (4, (2, 40), [3, 16], None),
        (8, (2, 5, 1, 3), [128, 128], ConvGeometry((1, 1), (0, 0), (1, 1), 2)),
    ],
    ids=["nibbles", "three bits", "zero point beyond a nibble", "bytes"],
)
def test_unpacking_restores_a_packed_layer(bits, shape, zero_point, geometry):
    tensors = layer(bits, shape, zero_point)
    spec, operands = packed_operands(tensors, geometry)
    assert operands["weight"].shape == spec.weight_shape()
    assert operands["weight"].dtype == np.int8
    again = layer_tensors(spec, operands)
    assert torch.equal(again.weight.integers(), tensors.weight.integers())
    assert torch.equal(again.weight.scale, tensors.weight.scale)
    assert torch.equal(again.bias, tensors.bias)
    for name in ("scale", "inv_scale", "low", "high"):
        assert torch.equal(getattr(again.activation, name), getattr(tensors.activation, name))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("geometry", [None, SAME, ConvGeometry((2, 1), (0, 1), (1, 2), 2)])
def test_on_a_cpu_a_kernel_layer_equals_a_deployed_layer(bits, geometry):
    shape = (6, 8) if geometry is None else (6, 8 // geometry.groups, 3, 3)
    tensors = layer(bits, shape, [3] * 6 if bits == 4 else [128] * 6)
    x = torch.randn(3, 5, 8) if geometry is None else torch.randn(3, 8, 7, 6)
    step = torch.tensor([2, 0, 1])
    for values in (x, x.half()):
        wanted = DeployedLayer(tensors, geometry)(values, step)
        assert torch.equal(KernelLayer(tensors, geometry)(values, step), wanted)
    assert torch.equal(KernelLayer(tensors, geometry)(x, 1), DeployedLayer(tensors, geometry)(x, 1))


def test_scales_stay_float32_in_a_half_precision_model():
    tensors = layer(4, (2, 40), [3, 15])
    module = KernelLayer(tensors, None)
    before = module.terms.clone()
    module.half()
    assert module.terms.dtype == module.tables.dtype == torch.float32
    assert torch.equal(module.terms, before)
    assert module(torch.randn(1, 40).half(), 0).dtype == torch.float16


def test_weights_keep_their_order_in_a_channels_last_model():
    """Kernels ignore strides, so another memory order would be another weight."""
    module = KernelLayer(layer(4, (2, 5, 3, 3), [0, 7]), SAME)
    before = module.packed.clone()
    module.to(memory_format=torch.channels_last)
    assert module.packed.is_contiguous()
    assert torch.equal(module.packed, before)
    x = torch.randn(1, 5, 4, 4)
    turned = module.packed.to(memory_format=torch.channels_last)
    operands = (turned, module.terms, module.tables, torch.tensor([0]))
    with pytest.raises(UsageError, match="weight must be contiguous"):
        low_bit(x, *operands, None, flat_fields(module.spec), False)


def test_the_operators_list_of_integers_restores_the_layer():
    for geometry in (None, Geometry((1, 3), (2, 1), (0, 1), (1, 2), 4)):
        spec = LayerSpec(64, 32, 20, 4, 8, geometry)
        assert spec_from_flat(flat_fields(spec)) == spec
    with pytest.raises(UsageError, match="takes group as 1 integers"):
        spec_from_flat(flat_fields(LayerSpec(64, 32, 20, 4, 8))[:-1])


def test_the_operator_passes_torchs_checks():
    module = KernelLayer(layer(4, (2, 5, 3, 3), [0, 7]), SAME)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 4, 4).contiguous(memory_format=form)
        operands = (module.packed, module.terms, module.tables, torch.tensor([0, 2]))
        torch.library.opcheck(low_bit, (x, *operands, None, flat_fields(module.spec), True))


def test_operands_that_do_not_fit_are_named():
    module = KernelLayer(layer(4, (2, 40), [3, 15]), None)
    with pytest.raises(StepError):
        module(torch.randn(1, 40))
    with pytest.raises(UsageError, match=r"takes \[B, ..., 40\], got \[1, 41\]"):
        low_bit(
            torch.randn(1, 41),
            module.packed,
            module.terms,
            module.tables,
            torch.tensor([0]),
            None,
            flat_fields(module.spec),
            False,
        )
    with pytest.raises(UsageError, match=r"float16 or float32, got torch.bfloat16"):
        module(torch.randn(1, 40).bfloat16(), 0)
    module.packed = module.packed[:1]
    with pytest.raises(UsageError, match=r"weight must be torch.int8 of \[2, 1, 1, 32\]"):
        module(torch.randn(1, 40), 0)


def test_a_denoiser_of_kernel_layers_equals_the_deployed_denoiser(digits_run):
    from trtq.runs.folder import open_run

    run = open_run(digits_run)
    sample = torch.randn(4, *run.source().sample_shape, generator=torch.Generator().manual_seed(0))
    timestep, labels = torch.tensor([10, 400, 700, 990]), torch.tensor([0, 3, 7, 9])
    with torch.no_grad():
        wanted = run.denoiser()(sample, timestep, labels).sample
        kernels = run.denoiser(kernels=True)
        actual = kernels(sample, timestep, labels).sample
    layers = [m for m in kernels.modules() if isinstance(m, KernelLayer)]
    assert len(layers) == len(run.manifest.layers)
    # The denoiser uses torch's group norms, so values on a tie may get the neighbouring code.
    noise = (actual - wanted).square().mean() / wanted.square().mean()
    assert noise < 1e-3
