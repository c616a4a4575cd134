"""NVFP4 layers equal a numpy reference bit for bit, in every form."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.quant import nvfp4_reference as reference
from trtq.calib.policy import Policy, Rule, plan_layers
from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.quant import LayerPlan, TimestepTable, convert
from trtq.quant.formats import format_range, layer_class, stored_tensors
from trtq.quant.formats.e2m1 import E2M1, LIMIT, UNIT, e2m1, input_numbers, weight_blocks
from trtq.quant.formats.nvfp4 import DeployedNvfp4, Nvfp4Tensors, fake_nvfp4
from trtq.quant.timestep import step_scope

TABLE = TimestepTable([1.0, 500.0])


def nvfp4(source, **options):
    layer = layer_class("linear", "nvfp4", None)(source, TABLE, **options)
    layer.activation.set_range(torch.tensor([2.0, 3.0]), torch.zeros(2))
    return layer


def rows(*shape, seed=0):
    """Numbers of many sizes: blocks of zeros, tiny blocks, and outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.exp2(rng.integers(-14, 4, (*shape[:-1], 1))).astype(np.float32)
    x[0, :16] = 0
    x[1, 3] = 50
    return x


def test_numbers_round_as_ml_dtypes_does():
    exact = np.array([*E2M1, *(-n for n in E2M1[1:])], np.float32)
    middle = (exact[1:8] + exact[:7]) / 2
    near = [middle, np.nextafter(middle, np.float32(9)), np.nextafter(middle, np.float32(-9))]
    x = np.concatenate([exact, *near, *(-part for part in near), [7, 1e9, -1e9]]).astype(np.float32)
    np.testing.assert_array_equal(e2m1(torch.from_numpy(x)).numpy(), reference.e2m1(x))


def test_inputs_equal_the_reference_bit_for_bit():
    x = rows(40, 64)
    for inv_scale in (0.7, 1.0, 3.3e-3):
        result = input_numbers(torch.from_numpy(x), torch.tensor(inv_scale))
        expected = reference.of_input(x, np.float32(inv_scale))
        np.testing.assert_array_equal(result.numpy(), expected)


def test_weights_equal_the_reference_bit_for_bit():
    w = rows(40, 64, seed=1)
    layer = nvfp4(nn.Linear(64, 40))
    layer.weight.data = torch.from_numpy(w.copy())
    layer.weight_scale.data = layer._weight_range("minmax")[0]
    scale = np.abs(w).max() * np.float32(1 / 0.75)
    assert layer.weight_scale.item() == pytest.approx(float(scale))
    merged = layer.merge()
    expected_scale, expected = reference.of_weight(w, merged.scale.numpy())
    np.testing.assert_array_equal(
        merged.block_scale.view(torch.float8_e4m3fn).float().numpy(), expected_scale
    )
    np.testing.assert_array_equal(
        merged.values().numpy(), reference.represented(expected_scale, expected)
    )
    assert torch.equal(merged.dequantize(), layer.quantized_weight())
    assert expected_scale.max() <= 384


def test_four_over_six_is_never_worse_than_six():
    torch.manual_seed(0)
    u = torch.randn(200, 64).clamp(-3, 3) * 0.2
    scale, numbers = weight_blocks(u)
    ours = numbers * (scale * UNIT)[..., None]
    six_scale, six_numbers = reference.blocks_of(u.numpy())
    six = six_numbers * (six_scale * reference.UNIT)[..., None]
    blocks = u.reshape(200, -1, 16)
    error = (ours - blocks).square().sum(-1)
    error_six = (torch.from_numpy(six) - blocks).square().sum(-1)
    assert bool((error <= error_six * (1 + 1e-6)).all())
    assert float(error.sum()) < 0.95 * float(error_six.sum())


def test_blocks_with_the_largest_number_at_6_equal_those_of_comfy_kitchen():
    """Another implementation of the same format; its scale of the tensor is `UNIT` here."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = torch.from_numpy(rows(32, 64, seed=2)).clamp(-LIMIT, LIMIT).half().float()
    unit = torch.tensor(UNIT)
    codes, scales = kitchen.quantize_nvfp4(x, unit)
    theirs = kitchen.dequantize_nvfp4(codes, unit, scales, torch.float32)
    assert torch.equal(theirs + 0.0, input_numbers(x, torch.tensor(1.0)))


def test_every_form_of_a_layer_computes_the_same():
    torch.manual_seed(0)
    source = nn.Linear(64, 20)
    layer = nvfp4(source)
    tensors = Nvfp4Tensors.merge(layer)
    deployed = DeployedNvfp4(tensors)
    x = torch.randn(3, 5, 64)
    for step in (0, 1):
        with step_scope(step), torch.no_grad():
            torch.testing.assert_close(layer(x), deployed(x), rtol=1e-4, atol=1e-5)
    exact = source(x).detach()
    error = (deployed(x, 0) - exact).square().sum() / exact.square().sum()
    assert 1e-4 < float(error) < 0.04
    index = torch.tensor([0, 1, 0])
    each = torch.cat([deployed(x[i : i + 1], int(step)) for i, step in enumerate(index)])
    torch.testing.assert_close(deployed(x, index), each)
    assert torch.equal(deployed.half().inv_scale, tensors.activation.inv_scale)


def test_the_largest_recorded_value_is_the_largest_number():
    scale, _ = format_range("nvfp4", torch.tensor([-4.0]), torch.tensor([2.0]))
    x = torch.zeros(1, 16)
    x[0, 0] = -4.0
    assert float(input_numbers(x, 1 / scale)[0, 0] * scale) == pytest.approx(-4.0)


def test_a_file_holds_four_bits_and_one_byte_for_each_block():
    source = nn.Linear(64, 5)
    tensors = Nvfp4Tensors.merge(nvfp4(source))
    named = tensors.tensors()
    assert named["weight.codes"].nbytes == 3 * 64
    assert named["weight.block_scale"].nbytes == 5 * 4
    again = stored_tensors(named, "nvfp4", 4, None, source)
    assert torch.equal(again.weight.dequantize(), tensors.weight.dequantize())
    assert torch.equal(again.weight.codes, tensors.weight.codes)
    damaged = named | {"weight.block_scale": torch.full((5, 4), 127, dtype=torch.uint8)}
    with pytest.raises(ArtefactError, match="finite numbers, 0 or more"):
        stored_tensors(damaged, "nvfp4", 4, None, source)
    with pytest.raises(ArtefactError, match="blocks of 16 do not divide 60"):
        stored_tensors(named, "nvfp4", 4, None, nn.Linear(60, 5))


def test_gradients_pass_straight_through():
    scale = torch.tensor(1.0, requires_grad=True)
    x = torch.full((1, 16), 0.3)
    x[0, 0], x[0, 1] = 5.0, -0.2
    x.requires_grad_()
    fake_nvfp4(x, scale, weight=False).sum().backward()
    assert x.grad[0].tolist() == [0.0] + [1.0] * 15
    assert bool(torch.isfinite(scale.grad))


def test_adapters_are_trained_through_the_blocks():
    torch.manual_seed(0)
    layer = nvfp4(nn.Linear(64, 16), rank=4)
    target = layer.weight.detach() + 0.1 * torch.randn(16, 1) @ torch.randn(1, 64)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=5e-3)
    losses = []
    for _ in range(100):
        loss = (layer.quantized_weight() - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.4 * losses[0]
    merged = Nvfp4Tensors.merge(layer).weight.dequantize()
    torch.testing.assert_close(merged, layer.quantized_weight())


def test_what_nvfp4_does_not_have_is_refused():
    with pytest.raises(QuantizationError, match="do not divide 60"):
        nvfp4(nn.Linear(60, 16))
    with pytest.raises(QuantizationError, match='base "int"'):
        nvfp4(nn.Linear(64, 16), base="int", rank=2)
    plan = LayerPlan("0", "conv2d", 4, 4, "r", format="nvfp4")
    with pytest.raises(QuantizationError, match="layer '0': NVFP4 has linear layers only"):
        convert(nn.Sequential(nn.Conv2d(16, 16, 1)), [plan], TABLE)
    layer = nvfp4(nn.Linear(64, 16))
    layer.weight_scale.data.zero_()
    with pytest.raises(NonFiniteError, match="weight scale"):
        layer.merge()


def test_layers_that_cannot_be_nvfp4_compute_in_integers():
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Linear(40, 64), nn.Linear(64, 8), nn.Conv2d(16, 16, 1)
    )
    rules = Policy(family="x", rule=[Rule(layers=["*"], bits="recipe", reason="body")])
    plans = plan_layers(model, rules, "nvfp4")
    assert [plan.precision for plan in plans] == ["nvfp4", "w8a8", "w8a8", "w8a8"]
    assert "blocks of 16 do not divide 40 input channels" in plans[1].reason
    assert "NVFP4 needs 16 channels, and the layer has 8" in plans[2].reason
    assert "NVFP4 has no convolutions" in plans[3].reason
    fp8 = [plan.precision for plan in plan_layers(model, rules, "fp8")]
    assert fp8 == ["fp8", "fp8", "w8a8", "fp8"]
