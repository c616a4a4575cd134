"""Decomposed attention, split convolutions, learned rounding: equal in float, exact in integers."""

import pytest
import torch
from torch import nn

from tests.conftest import tiny_pipeline
from trtq.calib.policy import load_policy, plan_layers
from trtq.diffusion.loading import open_pipeline
from trtq.errors import QuantizationError
from trtq.quant import (
    ActivationTensors,
    ProductTensors,
    QuantConv2d,
    QuantProduct,
    Structure,
    TimestepTable,
    apply_structure,
    attention_modules,
    convert,
    merge,
    skip_splits,
    step_scope,
)
from trtq.quant.adaround import hard_direction, initial_alpha, rounding_loss, soft_direction
from trtq.quant.deployed import DeployedProduct
from trtq.quant.structure import SplitConv2d

TABLE = TimestepTable([1, 501, 901])


def test_the_structure_changes_nothing_but_rounding():
    unet = tiny_pipeline().unet.eval()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0]), torch.arange(3)
    with torch.no_grad():
        before = unet(x, t, class_labels=labels).sample
        structure = Structure(tuple(attention_modules(unet)), skip_splits(unet))
        assert structure.attention
        assert structure.splits
        apply_structure(unet, structure)
        after = unet(x, t, class_labels=labels).sample
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_cross_attention_with_a_mask_changes_nothing_but_rounding():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    holder = nn.ModuleDict({"attention": attention})
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
    mask = torch.zeros(3, 1, 7)
    mask[:, :, 5:] = -10000.0
    with torch.no_grad():
        before = attention(x, context, attention_mask=mask)
        apply_structure(holder, Structure(("attention",)))
        after = attention(x, context, attention_mask=mask)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_skip_splits_are_at_the_channel_where_decoder_and_skip_join():
    unet = tiny_pipeline().unet
    seen = {}

    def hook(name):
        def keep(_, inputs):
            seen[name] = inputs[0].shape[1]

        return keep

    splits = skip_splits(unet)
    handles = [unet.get_submodule(n).register_forward_pre_hook(hook(n)) for n in splits]
    widths = {}
    for outer, block in enumerate(unet.up_blocks):
        original = block.forward

        def forward(hidden_states, *args, _original=original, _outer=outer, **kwargs):
            widths[f"up_blocks.{_outer}.resnets.0.conv_shortcut"] = hidden_states.shape[1]
            return _original(hidden_states, *args, **kwargs)

        block.forward = forward
    with torch.no_grad():
        unet(torch.randn(1, 1, 8, 8), 3, class_labels=torch.tensor([1]))
    for handle in handles:
        handle.remove()
    assert {name: splits[name] for name in widths if name in splits} == {
        name: width for name, width in widths.items() if name in splits
    }
    assert all(splits[name] < seen[name] for name in splits)


@pytest.mark.parametrize(("groups", "split"), [(2, 2), (1, 0), (1, 4)])
def test_unsupported_splits_are_refused(groups, split):
    with pytest.raises(QuantizationError, match="cannot split"):
        SplitConv2d(nn.Conv2d(4, 4, 1, groups=groups), split)


def test_a_structure_of_another_model_is_refused():
    with pytest.raises(QuantizationError, match="no module 'elsewhere'"):
        apply_structure(nn.Sequential(), Structure(("elsewhere",)))


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (8, 8)])
def test_a_deployed_product_equals_the_trained_product(bits):
    torch.manual_seed(0)
    product = QuantProduct(TABLE, *bits)
    for quantizer in (product.left, product.right):
        # Powers of two: both forms are exact, so they must be equal bit for bit.
        middle = 2.0 ** (quantizer.bits - 1)
        quantizer.set_range(torch.tensor([0.25, 0.125, 0.0625]), torch.full((3,), middle))
    deployed = DeployedProduct(ProductTensors.merge(product))
    a, b = torch.randn(4, 2, 5, 6), torch.randn(4, 2, 6, 3)
    for step in (0, 2, torch.tensor([0, 1, 2, 1])):
        with step_scope(step), torch.no_grad():
            torch.testing.assert_close(deployed(a, b), product(a, b), rtol=0, atol=0)


def test_stored_product_tensors_are_restored():
    product = QuantProduct(TABLE, 8, 4)
    merged = ProductTensors.merge(product)
    again = ProductTensors.from_tensors(merged.tensors(), left_bits=8, right_bits=4)
    for expected, actual in zip(merged.operands.values(), again.operands.values(), strict=True):
        assert isinstance(actual, ActivationTensors)
        assert torch.equal(expected.scale, actual.scale)
        assert torch.equal(expected.low, actual.low)


def test_rounding_starts_at_nearest_and_stays_fixed_while_the_weight_changes():
    torch.manual_seed(0)
    layer = QuantConv2d(nn.Conv2d(3, 4, 3), TABLE)
    nearest = layer.merge()
    layer.alpha = nn.Parameter(initial_alpha(layer.weight.detach(), layer.weight_scale.detach()))
    assert torch.equal(layer.merge().codes, nearest.codes)
    layer.soft_rounding = True
    inside = (nearest.codes > 0) & (nearest.codes < 15)
    soft = layer.quantized_weight()
    torch.testing.assert_close(soft[inside], layer.weight[inside], rtol=1e-3, atol=1e-5)
    layer.soft_rounding = False
    layer.tune()
    with torch.no_grad():
        layer.tuned_weight += layer.weight_scale
    moved = layer.merge().codes.int() - nearest.codes.int()
    assert set(moved[nearest.codes < 15].unique().tolist()) <= {0, 1, 2}
    assert float((moved[nearest.codes < 15] == 1).float().mean()) > 0.9


def test_rounding_loss_is_zero_for_hard_directions():
    settled = torch.tensor([-20.0, 20.0])
    assert soft_direction(settled).tolist() == hard_direction(settled).tolist() == [0.0, 1.0]
    assert rounding_loss(settled, 2.0) == 0
    assert rounding_loss(torch.zeros(1), 20.0) > 0.9


def test_the_teacher_does_not_use_tuned_weights():
    from trtq.quant import float_scope

    layer = QuantConv2d(nn.Conv2d(3, 4, 3), TABLE)
    x = torch.randn(2, 3, 5, 5)
    with float_scope(), torch.no_grad():
        before = layer(x)
        layer.tune()
        layer.tuned_weight.zero_()
        layer.tuned_bias.zero_()
        assert torch.equal(layer(x), before)
    with step_scope(0), torch.no_grad():
        assert not layer(x).any()


def test_merging_can_release_the_float_weights():
    source = open_pipeline(tiny_pipeline())
    plans = plan_layers(source.denoiser, load_policy("UNet2DModel"), "w4a8")
    quantized = convert(source.denoiser, plans, TABLE)
    for _, quantizer in quantized.activations():
        quantizer.set_range(torch.full((3,), 0.1), quantizer.zero_point.detach())
    kept = merge(quantized)
    released = merge(quantized, release=True)
    assert kept.keys() == released.keys()
    for name, layer in quantized.layers():
        assert layer.weight.numel() == 0
        assert torch.equal(kept[name].weight.codes, released[name].weight.codes)
