"""Weight-only layers: groups, half-precision scales, one set of codes in every form."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from trtq.calib.policy import Policy, Rule, load_policy, plan_layers
from trtq.calib.recipe import load_recipe
from trtq.errors import ArtefactError, NonFiniteError, RecipeError
from trtq.precision import fitting_group, parse_precision
from trtq.quant import LayerPlan, TimestepTable, convert, deploy, merge
from trtq.quant.formats import layer_class, stored_tensors
from trtq.quant.formats.weight_only import DeployedWeightOnly, WeightOnlyTensors
from trtq.quant.timestep import step_scope
from trtq.train.rounding import _learn_layer

TABLE = TimestepTable([1.0, 500.0])
GROUPED = {"linear": (nn.Linear(128, 6), 64), "one scale each": (nn.Linear(20, 6), None)}
CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 5)),
    "conv3d": (nn.Conv3d(4, 6, 1), (2, 4, 3, 2, 5)),
}


def weight_only(source, group=None, bits=4, kind="linear", **options):
    return layer_class(kind, "weight_only", group)(source, TABLE, weight_bits=bits, **options)


@pytest.mark.parametrize(
    ("channels", "wanted", "bits", "group"),
    [
        (256, None, 4, 64),
        (256, None, 8, None),
        (256, 128, 4, 128),
        (256, 128, 8, 128),
        (96, 64, 4, 32),
        (320, 128, 4, 64),
        (40, 128, 4, None),
        (256, 0, 4, None),
    ],
)
def test_the_group_is_the_largest_that_is_wanted_and_divides(channels, wanted, bits, group):
    assert fitting_group(channels, wanted, bits) == group


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("method", ["minmax", "search"])
def test_every_form_of_a_linear_layer_has_the_same_weight(method, case, bits):
    source, group = GROUPED[case]
    layer = weight_only(source, group, bits, weight_method=method)
    tensors = WeightOnlyTensors.merge(layer)
    weight = tensors.weight.dequantize()
    torch.testing.assert_close(layer.quantized_weight(), weight, rtol=1e-6, atol=0)
    assert torch.equal(tensors.weight.scale.half().float(), tensors.weight.scale)
    each = (
        tensors.weight.scale if group is None else tensors.weight.scale.repeat_interleave(group, 1)
    )
    # Min-max leaves no more than half a scale of error; the search clips some weights.
    if method == "minmax":
        assert bool(((source.weight - weight).abs() <= 0.501 * each).all())
    assert float((source.weight - weight).square().mean()) < 0.02 * float(source.weight.var())
    x = torch.randn(3, 5, source.in_features)
    deployed = DeployedWeightOnly(tensors, None)
    torch.testing.assert_close(deployed(x), nn.functional.linear(x, weight, source.bias))
    with step_scope(0):
        torch.testing.assert_close(layer(x), deployed(x))
    torch.testing.assert_close(deployed.half()(x.half()).float(), deployed(x), rtol=0, atol=2e-2)
    assert torch.equal(deployed.weight_scale, tensors.weight.scale)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_has_one_scale_per_output_channel(kind):
    source, shape = CONVOLUTIONS[kind]
    layer = weight_only(source, kind=kind)
    tensors = WeightOnlyTensors.merge(layer)
    assert tensors.weight.scale.shape == (6, *[1] * (len(shape) - 1))
    x = torch.randn(shape)
    deployed = DeployedWeightOnly(tensors, layer.geometry)
    with step_scope(1):
        torch.testing.assert_close(layer(x), deployed(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_file_holds_packed_codes_and_half_precision_scales(bits):
    source = nn.Linear(64, 5)
    tensors = WeightOnlyTensors.merge(weight_only(source, 32, bits))
    named = tensors.tensors()
    assert sum(t.nbytes for n, t in named.items() if n != "bias") == (
        -(-5 * bits // 8) * 64 + 5 * 2 * 2
    )
    again = stored_tensors(named, "weight_only", bits, 32, source)
    assert torch.equal(again.weight.codes, tensors.weight.codes)
    assert torch.equal(again.weight.dequantize(), tensors.weight.dequantize())
    assert torch.equal(again.bias, tensors.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.scale": torch.ones(5, 1).half()}, "requires"),
        ({"weight.scale": torch.zeros(5, 2).half()}, "positive finite"),
        ({"weight.scale": torch.ones(5, 2)}, "float16"),
        ({"weight.codes": torch.zeros(5, 64, dtype=torch.uint8)}, "requires"),
        ({"bias": torch.zeros(4)}, "bias of shape"),
        ({"bias": torch.full((5,), torch.nan)}, "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    source = nn.Linear(64, 5)
    named = WeightOnlyTensors.merge(weight_only(source, 32)).tensors() | change
    with pytest.raises((ArtefactError, NonFiniteError), match=message):
        stored_tensors(named, "weight_only", 4, 32, source)


def test_a_group_of_zeros_and_a_tiny_weight_have_a_positive_scale():
    source = nn.Linear(64, 2)
    with torch.no_grad():
        source.weight[0] = 0
        source.weight[1] *= 1e-7
    tensors = WeightOnlyTensors.merge(weight_only(source, 32))
    assert bool((tensors.weight.scale > 0).all())
    assert float(tensors.weight.dequantize()[0].abs().max()) == 0


@pytest.mark.parametrize("base", ["fp", "int"])
def test_adapters_and_scales_are_trained_inside_the_groups(base):
    torch.manual_seed(0)
    source = nn.Linear(64, 8)
    layer = weight_only(source, 32, rank=4, base=base, split_scale=base == "int")
    target = nn.functional.linear(torch.eye(64), source.weight)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B, layer.weight_scale], lr=1e-3)
    losses = []
    for _ in range(60):
        loss = (
            (nn.functional.linear(torch.eye(64), layer.quantized_weight()) - target).square().sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.weight_scale.grad.shape == (8, 2)
    # With base "int" the codes are those of the weight to begin with.
    assert base == "int" or min(losses) < 0.95 * losses[0]
    tensors = WeightOnlyTensors.merge(layer)
    torch.testing.assert_close(tensors.weight.dequantize(), layer.quantized_weight())


def test_rounding_is_learned_in_groups():
    torch.manual_seed(0)
    source = nn.Linear(64, 8)
    layer = weight_only(source, 32)
    x = torch.randn(64, 8) @ torch.randn(8, 64)
    y = source(x).detach()

    def error():
        with step_scope(0), torch.no_grad():
            return float((layer(x) - y).square().mean())

    before = error()
    changed = _learn_layer(layer, x, y, torch.zeros(64, dtype=torch.long), 300, torch.Generator())
    assert changed > 0
    assert error() < before
    merged = WeightOnlyTensors.merge(layer).weight.dequantize()
    torch.testing.assert_close(merged, layer.quantized_weight())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.body = nn.Linear(64, 96)
        self.narrow = nn.Linear(40, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(64, 64)

    def forward(self, x, timestep):
        return self.last(self.first(x)) + self.body(x)[..., :64]


def policy(**rules):
    rows = [
        Rule(layers=[name], reason=name, **({"bits": bits} if isinstance(bits, str) else bits))
        for name, bits in rules.items()
    ]
    return Policy(family="mixed", rule=rows)


def test_a_weight_only_recipe_leaves_the_inputs_of_linear_layers_in_float():
    rules = policy(
        first="w8a8", body="recipe", narrow="recipe", conv="recipe", last={"bits": "float"}
    )
    plans = {p.name: p for p in plan_layers(Mixed(), rules, "w4a16")}
    assert {name: (p.precision, p.group) for name, p in plans.items()} == {
        "first": ("w8a16", None),
        "body": ("w4a16", 64),
        "narrow": ("w4a16", None),
        "conv": ("w8a8", None),
        "last": ("float", None),
    }
    assert (
        "one scale per output channel, since groups of 64 do not divide 40"
        in plans["narrow"].reason
    )
    assert "computes in integers" in plans["conv"].reason
    assert not plans["body"].operands


def test_a_policy_mixes_integers_and_weight_only_layers():
    rules = policy(
        first={"bits": "recipe"}, body="w4a16", conv="w4a16", last={"bits": "w8a8"}, narrow="float"
    )
    plans = {p.name: p for p in plan_layers(Mixed(), rules, "w4a8")}
    assert [plans[n].precision for n in ("first", "body", "conv", "last")] == [
        "w4a8",
        "w4a16",
        "w4a16",
        "w8a8",
    ]
    assert plans["conv"].group is None
    override = policy(first={"bits": "w8a8", "weight_only": "w4a16"})
    (plan,) = [p for p in plan_layers(Mixed(), override, "w4a16") if p.quantized]
    assert (plan.precision, plan.group) == ("w4a16", 64)
    (plan,) = [p for p in plan_layers(Mixed(), override, "w8a16") if p.quantized]
    assert (plan.precision, plan.group) == ("w8a16", None)


def test_layers_of_both_formats_work_in_one_model():
    torch.manual_seed(0)
    model = Mixed().eval()
    plans = [
        LayerPlan("first", "linear", 8, 8, "r"),
        LayerPlan("body", "linear", 4, 16, "r", format="weight_only", group=32),
        LayerPlan("last", "linear", 8, 16, "r", format="weight_only"),
    ]
    quantized = convert(model, plans, TABLE)
    for _, quantizer in quantized.activations():
        quantizer.set_range(torch.full((2,), 0.03), torch.full((2,), 128.0))
    assert [name for name, _ in quantized.activations()] == ["first.activation"]
    x, t = torch.randn(2, 64), torch.tensor([1.0, 500.0])
    with torch.no_grad():
        expected, teacher = quantized(x, t), quantized.teacher(x, t)
    merged = merge(quantized)
    torch.manual_seed(0)
    with torch.no_grad():
        result = deploy(Mixed().eval(), merged, TABLE)(x, t)
    torch.testing.assert_close(result, expected)
    error = (teacher - expected).square().sum() / teacher.square().sum()
    assert 0 < float(error) < 0.02


BAD = {
    "other weight bits": ({"bits": "w3a16"}, "w4a16 or w8a16"),
    "a format as bits": ({"bits": "fp8"}, "is a format; write format = 'fp8'"),
    "group of integers": ({"bits": "w4a4", "group": 64}, "group=64 is for weight-only bits"),
    "other group": ({"bits": "w4a16", "group": 48}, "choose one of 0, 32, 64, 128"),
    "budget": ({"bits": "w4a16", "budget": "size=0.2x"}, "a budget chooses the bits of integer"),
    "unknown format": ({"format": "int5"}, "'int', 'fp8' or 'nvfp4'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_cannot_be_is_refused_in_one_line(case):
    given, message = BAD[case]
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(None, {"method": "search", **given})
    assert "\n" not in str(caught.value)


def test_a_policy_with_integers_as_weight_only_bits_is_refused(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text(
        'family = "x"\n[[rule]]\nlayers = ["*"]\nbits = "w8a8"\nweight_only = "w4a4"\nreason = "r"\n'
    )
    with pytest.raises(RecipeError, match="must be w4a16 or w8a16"):
        load_policy("x", file)


def test_precisions_are_read_in_either_case():
    assert parse_precision("W4A16").format == "weight_only"
    assert parse_precision("w4a8") == replace(parse_precision("w4a4"), activation_bits=8)
    for text in ("w4a1", "w16a16", "a16", "wxa16", "w4a16x", "w²a16"):
        with pytest.raises(RecipeError):
            parse_precision(text)
