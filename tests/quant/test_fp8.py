"""FP8 layers: rounding, gradients, one arithmetic in every form."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from trtq.calib.policy import Policy, Rule, plan_layers
from trtq.calib.recipe import load_recipe
from trtq.errors import ArtefactError, NonFiniteError, QuantizationError, RecipeError
from trtq.quant import TimestepTable
from trtq.quant.formats import layer_class, stored_tensors
from trtq.quant.formats.fp8 import (
    FP8_MAX,
    DeployedFp8,
    FloatQuantizer,
    Fp8Tensors,
    e4m3,
    fake_e4m3,
    float_range,
)
from trtq.quant.timestep import float_scope, step_scope

TABLE = TimestepTable([1.0, 500.0])
SOURCES = {
    "linear": (nn.Linear(20, 6), (3, 5, 20)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 5)),
    "conv3d": (nn.Conv3d(4, 6, 1), (2, 4, 3, 2, 5)),
}


def fp8(source, kind="linear", **options):
    layer = layer_class(kind, "fp8", None)(source, TABLE, **options)
    layer.activation.set_range(torch.tensor([0.01, 0.004]), torch.zeros(2))
    return layer


def test_every_number_rounds_as_ml_dtypes_does_and_saturates():
    exact = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    middle = (exact[1:] + exact[:-1]) / 2
    near = np.concatenate([middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    x = np.concatenate([exact, near.astype(np.float32)])
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3(torch.from_numpy(x)).numpy(), expected)
    large = torch.tensor([448.1, 470.0, 1e9, -1e9])
    assert e4m3(large).tolist() == [448.0, 448.0, 448.0, -448.0]


def test_the_largest_value_becomes_448():
    scale, zero_point = float_range(torch.tensor([-3.0, -1.0]), torch.tensor([2.0, 7.0]))
    torch.testing.assert_close(scale * FP8_MAX, torch.tensor([3.0, 7.0]))
    assert zero_point.tolist() == [0.0, 0.0]


def test_gradients_pass_straight_through_and_scales_learn():
    scale = torch.tensor(0.1, requires_grad=True)
    x = torch.tensor([0.31, 44.7, 50.0, -60.0], requires_grad=True)
    fake_e4m3(x, scale).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    inside = x.detach()[:2] / 0.1
    expected = float((e4m3(inside) - inside).sum()) + FP8_MAX - FP8_MAX
    assert float(scale.grad) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_form_of_a_layer_computes_the_same(kind):
    torch.manual_seed(0)
    source, shape = SOURCES[kind]
    layer = fp8(source, kind)
    tensors = Fp8Tensors.merge(layer)
    torch.testing.assert_close(layer.quantized_weight(), tensors.weight.dequantize())
    deployed = DeployedFp8(tensors, getattr(layer, "geometry", None))
    x = torch.randn(shape)
    for step in (0, 1):
        with step_scope(step), torch.no_grad():
            torch.testing.assert_close(layer(x), deployed(x), rtol=1e-4, atol=1e-4)
    error = (deployed(x, 0) - source(x)).square().sum() / source(x).square().sum()
    assert 0 < float(error.detach()) < 4e-3
    index = torch.tensor([0, 1, 0][: shape[0]])
    each = torch.cat([deployed(x[i : i + 1], int(step)) for i, step in enumerate(index)])
    torch.testing.assert_close(deployed(x, index), each)
    half = deployed.half()
    assert torch.equal(half.inv_scale, tensors.activation.inv_scale)


def test_each_channel_uses_the_largest_code():
    weight = Fp8Tensors.merge(fp8(nn.Linear(50, 7))).weight
    assert weight.values().abs().amax(1).tolist() == [448.0] * 7


def test_a_file_holds_one_byte_for_each_weight():
    source = SOURCES["linear"][0]
    tensors = Fp8Tensors.merge(fp8(source))
    named = tensors.tensors()
    assert named["weight.codes"].nbytes == source.weight.numel()
    again = stored_tensors(named, "fp8", 8, None, source)
    assert torch.equal(again.weight.dequantize(), tensors.weight.dequantize())
    assert torch.equal(again.activation.scale, tensors.activation.scale)
    named["weight.scale"] = torch.zeros(6, 1)
    with pytest.raises(ArtefactError, match="positive finite"):
        stored_tensors(named, "fp8", 8, None, source)


def test_adapters_and_scales_are_trained_through_the_rounding():
    torch.manual_seed(0)
    layer = fp8(nn.Linear(32, 8), rank=4)
    target = layer.weight.detach() + 0.02 * torch.randn(8, 1) @ torch.randn(1, 32)
    groups = [{"params": [layer.lora_A, layer.lora_B]}, {"params": layer.weight_scale, "lr": 1e-6}]
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    losses = []
    for _ in range(80):
        loss = (layer.quantized_weight() - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.3 * losses[0]
    torch.testing.assert_close(
        Fp8Tensors.merge(layer).weight.dequantize(), layer.quantized_weight()
    )
    assert layer.weight_level() == pytest.approx(8 * float(layer.weight_scale.detach().mean()))


def test_what_has_no_meaning_in_fp8_is_refused():
    with pytest.raises(QuantizationError, match='base "int"'):
        fp8(nn.Linear(4, 4), base="int", rank=2)
    layer = fp8(nn.Linear(4, 4))
    with pytest.raises(QuantizationError, match="no integer codes"):
        layer.activation.integer_bounds()
    with pytest.raises(QuantizationError, match="no integer codes"):
        layer.merge().integers()
    layer.activation.scale.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="activation scale"):
        Fp8Tensors.merge(layer)


def test_a_quantiser_returns_its_input_in_the_float_scope():
    x = torch.randn(3)
    with float_scope():
        assert FloatQuantizer(TABLE)(x) is x


def test_a_recipe_in_fp8_leaves_explicit_bits_of_the_policy_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(4, 4, 1))
    rules = [
        Rule(layers=["0"], bits="w8a8", reason="first"),
        Rule(layers=["*"], bits="recipe", reason="body"),
    ]
    plans = plan_layers(model, Policy(family="x", rule=rules), "fp8")
    assert [(p.precision, p.format, p.weight_bits) for p in plans] == [
        ("w8a8", "int", 8),
        ("fp8", "fp8", 8),
        ("fp8", "fp8", 8),
    ]
    rules[0] = Rule(layers=["0"], bits="fp8", reason="first")
    assert plan_layers(model, Policy(family="x", rule=rules), "w4a8")[0].format == "fp8"


BAD = {
    "other bits": ({"format": "fp8", "bits": "w4a4"}, "format='fp8' has the bits w8a8"),
    "group": ({"format": "fp8", "group": 64}, "for weight-only bits"),
    "budget": ({"format": "fp8", "budget": "size=0.4x"}, "bits of integer weights"),
    "base": (
        {
            "format": "fp8",
            "method": "efficientdm",
            "training": {"iterations": 2, "batch": 2, "base": "int"},
        },
        'training.base="int" has no meaning',
    ),
    "learned rounding": (
        {"format": "fp8", "method": "quest", "quest": {"adaround": 10}},
        "has no learned rounding",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_cannot_be_is_refused_in_one_line(case):
    given, message = BAD[case]
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(None, {"method": "search", **given})
    assert "\n" not in str(caught.value)


def test_a_format_determines_the_bits():
    assert load_recipe(None, {"method": "search", "format": "fp8"}).bits == "w8a8"
    assert load_recipe(None, {"method": "combined", "format": "fp8"}).precision == "fp8"
