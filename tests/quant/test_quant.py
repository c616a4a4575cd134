"""Rounding, tables, packing and layers."""

import pytest
import torch
from torch import nn

from trtq.errors import (
    ArtefactError,
    NonFiniteError,
    QuantizationError,
    RecipeError,
    StepError,
    UsageError,
)
from trtq.quant import (
    ActivationQuantizer,
    DeployedLayer,
    LayerTensors,
    QuantConv2d,
    QuantLinear,
    TimestepTable,
    fake_quant,
    float_scope,
    pack_codes,
    step_scope,
    unpack_codes,
    weight_qparams,
)
from trtq.quant.geometry import ConvGeometry
from trtq.quant.packing import PackedWeight
from trtq.quant.ranges import affine_from_range, row_qparams


def test_ties_round_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25
    y = fake_quant(x, 0.25, 8.0, 0, 15)
    assert (y / 0.25).tolist() == [-2, -2, 0, 0, 2, 2]


def test_the_range_is_checked_after_rounding():
    # 15.4 rounds to 15, the last code, although it lies beyond the range.
    x = torch.tensor([15.4, 15.6], requires_grad=True)
    fake_quant(x, 1.0, 0.0, 0, 15).sum().backward()
    assert x.grad.tolist() == [1, 0]


def naive(x, scale, zero, qmax):
    """Fake quantisation with autograd's own operators and straight-through rounding."""
    ratio = x / scale
    code = ratio + (ratio.round() - ratio).detach() + zero
    return (code.clamp(0, qmax) - zero) * scale


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (4, 1, 1, 1)], ids=["tensor", "channel", "item"])
def test_gradients_broadcast_like_the_naive_form(shape):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    upstream = torch.randn_like(x)
    results = []
    for form in (lambda *a: fake_quant(*a[:3], 0, 15), lambda *a: naive(*a, 15)):
        leaf = x.clone().requires_grad_()
        scale = torch.full(shape, 0.23).requires_grad_()
        zero = torch.full(shape, 6.0).requires_grad_()
        (form(leaf, scale, zero) * upstream).sum().backward()
        results.append((leaf.grad, scale.grad, zero.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("zero", "levels"), [(3.0, 16), (3.4, 17)])
def test_a_fractional_zero_point_leaves_the_grid(zero, levels):
    y = fake_quant(torch.linspace(-40, 40, 4001), 1.0, zero, 0, 15)
    assert len(y.unique()) == levels


class TestTimestepTable:
    def test_nearest_and_ties_to_the_noisier(self):
        table = TimestepTable([951, 1, 501])
        t = torch.tensor([0, 1, 250, 251, 252, 725, 726, 999])
        assert table.index(t).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize("t", [501, 501.0, torch.tensor(501), torch.tensor([501.0])])
    def test_accepts_every_form_of_a_timestep(self, t):
        index = TimestepTable([1, 501]).index(t)
        assert index.tolist() == [1]
        assert index.dtype == torch.long

    @pytest.mark.parametrize(
        ("timesteps", "message"),
        [([], "at least one"), ([1, 1], "differ"), ([float("nan")], "finite")],
    )
    def test_refuses(self, timesteps, message):
        with pytest.raises(UsageError, match=message):
            TimestepTable(timesteps)

    def test_refuses_nan_and_matrices(self):
        table = TimestepTable([1, 2])
        with pytest.raises(StepError, match="NaN"):
            table.index(float("nan"))
        with pytest.raises(StepError, match=r"shape \(2, 2\)"):
            table.index(torch.zeros(2, 2))


class TestActivationQuantizer:
    def test_items_at_different_steps_equal_items_alone(self):
        quantizer = ActivationQuantizer(4, TimestepTable([1, 2, 3]))
        quantizer.set_range(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([3.0, 8.0, 5.0]))
        x = torch.randn(3, 2, 4, 4)
        together = quantizer(x, torch.tensor([2, 0, 1]))
        for item, step in enumerate([2, 0, 1]):
            assert torch.equal(together[item], quantizer(x[item : item + 1], step)[0])

    @pytest.mark.parametrize("step", [3, -1, torch.tensor([0, 1])])
    def test_refuses_a_step_that_does_not_fit(self, step):
        quantizer = ActivationQuantizer(4, TimestepTable([1, 2, 3]))
        with pytest.raises(StepError):
            quantizer(torch.zeros(3, 4), step)

    def test_needs_a_step(self):
        with pytest.raises(StepError, match="timestep"):
            ActivationQuantizer(4, TimestepTable([1]))(torch.zeros(1))

    def test_eight_bits_fit_int8(self):
        quantizer = ActivationQuantizer(8, TimestepTable([1, 2]), "rounded")
        low, high = quantizer.integer_bounds()
        assert (low.tolist(), high.tolist()) == ([-128, -128], [127, 127])
        assert not quantizer.zero_point.requires_grad

    def test_rounded_zero_points_are_integers_in_the_forward_pass_and_are_trained(self):
        quantizer = ActivationQuantizer(4, TimestepTable([1]), "rounded")
        quantizer.set_range(torch.tensor([0.5]), torch.tensor([3.4]))
        y = quantizer(torch.linspace(-9, 9, 999)[None], 0)
        assert len(y.unique()) == 16
        y.sum().backward()
        assert quantizer.zero_point.grad.item() != 0


class TestPacking:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("channels", [1, 3, 8, 13])
    def test_unpack_inverts_pack(self, bits, channels):
        codes = torch.randint(0, 2**bits, (channels, 5, 3), dtype=torch.uint8)
        packed = pack_codes(codes, bits)
        assert packed.shape == (-(-channels * bits // 8), 5, 3)
        assert torch.equal(unpack_codes(packed, bits, channels), codes)

    def test_two_codes_make_the_documented_byte(self):
        assert pack_codes(torch.tensor([[1], [15]]), 4).tolist() == [[0xF1]]

    def test_refuses_codes_that_do_not_fit(self):
        with pytest.raises(QuantizationError, match=r"0 \.\. 15"):
            pack_codes(torch.tensor([16]), 4)

    def test_refuses_a_wrong_number_of_bytes(self):
        with pytest.raises(ArtefactError, match="need 2 bytes"):
            unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 4)


def layer_pair(kind, bits, **options):
    torch.manual_seed(1)
    table = TimestepTable([1, 2, 3])
    if kind == "linear":
        source = nn.Linear(24, 10)
        layer = QuantLinear(source, table, weight_bits=bits, activation_bits=bits, **options)
        x, geometry = torch.randn(3, 6, 24), None
    else:
        source = nn.Conv2d(6, 10, 3, padding=1, stride=2)
        layer = QuantConv2d(source, table, weight_bits=bits, activation_bits=bits, **options)
        x, geometry = torch.randn(3, 6, 9, 9), ConvGeometry.of(source)
    if layer.lora_B is not None:
        nn.init.normal_(layer.lora_B, std=0.05)
    middle = 128.0 if bits == 8 else 6.0
    scale = torch.tensor([0.02, 0.03, 0.025]) * 16 * 2.0 ** (4 - bits)
    layer.activation.set_range(scale, torch.full((3,), middle))
    return source, layer, DeployedLayer(LayerTensors.merge(layer), geometry), x


@pytest.mark.parametrize("base", ["fp", "int"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_merged_layer_equals_the_trained_layer_at_every_step(kind, bits, base):
    _, layer, deployed, x = layer_pair(kind, bits, rank=4, base=base)
    for step in (0, 1, 2, torch.tensor([2, 0, 1])):
        expected, actual = layer(x, step), deployed(x, step)
        # The integers are equal; the float sums of 54 products differ only in their last bits.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = layer.merge()
    assert weight.shape == weight.codes.shape == layer.weight.shape
    assert torch.equal(pack_codes(weight.codes, bits), weight.packed)
    torch.testing.assert_close(weight.dequantize(), layer.quantized_weight(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_teacher_equals_the_source_layer(kind):
    source, layer, _, x = layer_pair(kind, 4, rank=4)
    with float_scope():
        assert torch.equal(layer(x), source(x))
    with pytest.raises(StepError, match="timestep"):
        layer(x)
    with step_scope(1):
        assert torch.equal(layer(x), layer(x, 1))


def test_one_sided_weights_have_a_code_for_zero():
    source = nn.Linear(8, 4)
    with torch.no_grad():
        source.weight.uniform_(1.0, 2.0)
    for method in ("minmax", "search"):
        layer = QuantLinear(source, TimestepTable([1]), weight_method=method)
        assert bool((layer.weight_zero_point == 0).all())
    assert weight_qparams(source.weight, 4, "search")[1].min() < 0


def searched_one_by_one(rows, bits, symmetric):
    """The search as its formula says: the first of the candidates with the smallest error."""
    low, high = rows.amin(1), rows.amax(1)
    best = torch.full_like(low, torch.inf)
    kept = affine_from_range(low, high, bits, symmetric=symmetric)
    for index in range(80):
        c = 1 - 0.01 * index
        tried = affine_from_range(low * c, high * c, bits, symmetric=symmetric)
        d, z = (each[:, None] for each in tried)
        coded = ((rows / d).round() + z).clamp(0, 2**bits - 1)
        score = ((coded - z) * d - rows).abs().pow_(2.4).mean(1)
        better = score < best
        best = torch.where(better, score, best)
        kept = tuple(torch.where(better, *pair) for pair in zip(tried, kept, strict=True))
    return kept


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 37), (5, 3), (7, 27), (16, 300), (3, 1000), (2, 20000)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_that_are_computed_together_give_the_same_range(shape, symmetric):
    """Bit for bit, also with values left over after whole vectors, and with any candidates that the
    outermost values rule out; equal scores go to the first one."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for data in (rows, rows.abs(), rows.round(), torch.zeros(shape), torch.full(shape, -1e38)):
        for bits in (2, 4, 8):
            expected = searched_one_by_one(data, bits, symmetric)
            got = row_qparams(data, data.amin(1), data.amax(1), bits, "search", symmetric=symmetric)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_refuses_what_cannot_be_quantised():
    bad = nn.Linear(2, 2)
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        QuantLinear(bad, TimestepTable([1]))
    with pytest.raises(RecipeError, match="bits=9"):
        weight_qparams(torch.zeros(2, 2), 9)
    with pytest.raises(RecipeError, match="'median'"):
        weight_qparams(torch.zeros(2, 2), 4, "median")
    with pytest.raises(QuantizationError, match="reflect"):
        QuantConv2d(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), TimestepTable([1]))


def test_scaling_gradients_has_no_effect_with_adam():
    """This is why scale-aware optimisation is a learning rate per layer, not a gradient factor."""
    results = []
    for factor in (1.0, 0.03):
        p = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([p], lr=0.01, eps=1e-12)
        for _ in range(5):
            (factor * (p**2).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_codes_minus_zero_points_or_an_error(bits):
    """Zero points around the limits of int8, of which those of fine-tuned weights may lie outside."""
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(2, 1)
    for zero_point in (-130, -127, 2**bits - 129, 2**bits - 128, 0, 2**bits - 1, 127, 128, 129):
        points = torch.tensor([[float(zero_point)], [2.0 ** (bits - 1)]])
        weight = PackedWeight.of(codes, torch.ones(2, 1), points, bits)
        expected = codes.long() - points.long()
        if expected.min() < -128 or expected.max() > 127:
            with pytest.raises(QuantizationError, match=r"which int8 cannot hold"):
                weight.integers()
        else:
            assert weight.integers().dtype == torch.int8
            assert torch.equal(weight.integers().long(), expected)
