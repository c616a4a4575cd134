"""Attributes of low-bit layers, norms that stay, and convolutions over 1, 2 and 3 axes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from trtq.calib.policy import load_policy, plan_layers
from trtq.errors import QuantizationError
from trtq.quant import (
    DeployedLayer,
    LayerPlan,
    LayerTensors,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLinear,
    TimestepTable,
    convert,
    deploy,
    float_scope,
    layer_kind,
    layer_obstacle,
    merge,
    quantizable_layers,
)
from trtq.quant.exact import DeployedGroupNorm, DeployedLayerNorm, DeployedSilu
from trtq.quant.geometry import ConvGeometry
from trtq.quant.kernel_form import KernelLayer

TABLE = TimestepTable([1.0, 500.0])
CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), QuantConv1d, (11,)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), QuantConv2d, (5, 6)),
    "conv3d": (nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 1), padding=1), QuantConv3d, (3, 5, 4)),
}


def integer_convolution(codes, weight, geometry):
    """codes int64[B, K, ...], weight int64[N, K / groups, ...] -> int64[B, N, ...], by loops."""
    pads = [(0, 0), (0, 0), *((p, p) for p in geometry.padding)]
    x, kernel = np.pad(codes, pads), weight.shape[2:]
    sizes = [
        (x.shape[2 + axis] - geometry.dilation[axis] * (kernel[axis] - 1) - 1)
        // geometry.stride[axis]
        + 1
        for axis in range(geometry.axes)
    ]
    group_in, group_out = weight.shape[1], len(weight) // geometry.groups
    out = np.zeros((len(x), len(weight), *sizes), np.int64)
    for tap in itertools.product(*map(range, kernel)):
        place = tuple(
            slice(tap[a] * geometry.dilation[a], None, geometry.stride[a])
            for a in range(geometry.axes)
        )
        window = x[(slice(None), slice(None), *place)]
        window = window[(slice(None), slice(None), *(slice(size) for size in sizes))]
        for group in range(geometry.groups):
            rows = slice(group * group_out, (group + 1) * group_out)
            values = window[:, group * group_in : (group + 1) * group_in]
            taps = weight[(rows, slice(None), *tap)]
            out[:, rows] += np.einsum("nk,bk...->bn...", taps, values)
    return out


def quantized_convolution(kind, **options):
    torch.manual_seed(3)
    source, layer_class, size = CONVOLUTIONS[kind]
    layer = layer_class(source, TABLE, weight_bits=4, activation_bits=8, **options)
    layer.activation.set_range(torch.tensor([0.03, 0.05]), torch.full((2,), 128.0))
    return source, layer, torch.randn(2, 4, *size)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_deployed_convolution_equals_the_integer_arithmetic_exactly(kind):
    source, layer, x = quantized_convolution(kind)
    tensors, geometry = LayerTensors.merge(layer), ConvGeometry.of(source)
    tables = tensors.activation
    codes = (x * tables.inv_scale[1]).round().clamp(int(tables.low[1]), int(tables.high[1]))
    total = integer_convolution(
        codes.numpy().astype(np.int64), tensors.weight.integers().numpy().astype(np.int64), geometry
    )
    channel = (-1, *(1,) * geometry.axes)
    scale = tensors.weight.scale.reshape(channel) * tables.scale[1]
    expected = torch.from_numpy(total).float() * scale + tensors.bias.reshape(channel)
    assert torch.equal(DeployedLayer(tensors, geometry)(x, 1), expected)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_quantised_convolution_merges_trains_and_keeps_its_teacher(kind):
    source, layer, x = quantized_convolution(kind, rank=2)
    nn.init.normal_(layer.lora_B, std=0.05)
    deployed = DeployedLayer(LayerTensors.merge(layer), layer.geometry)
    for step in (0, torch.tensor([1, 0])):
        torch.testing.assert_close(deployed(x, step), layer(x, step), rtol=1e-5, atol=1e-5)
    with float_scope():
        assert torch.equal(layer(x), source(x))
    layer(x, 0).sum().backward()
    assert layer.lora_A.grad.shape == layer.lora_A.shape


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_tensors_of_a_convolution_survive_the_file(kind):
    _, layer, x = quantized_convolution(kind)
    tensors = LayerTensors.merge(layer)
    again = LayerTensors.from_tensors(
        tensors.tensors(), channels=6, weight_bits=4, activation_bits=8
    )
    geometry = layer.geometry
    assert torch.equal(DeployedLayer(again, geometry)(x, 0), DeployedLayer(tensors, geometry)(x, 0))


class CausalConv(nn.Conv3d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 0, 0, 0, 2, 0)))


@pytest.mark.parametrize(
    ("layer", "kind", "reason"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "conv2d", "reflect"),
        (nn.Conv1d(2, 2, 3, padding="same"), "conv1d", "'same'"),
        (nn.ConvTranspose2d(2, 2, 2), "conv_transpose", "transposed"),
        (CausalConv(2, 2, 3), "conv3d", "in its own way"),
    ],
)
def test_a_layer_that_cannot_be_low_bit_is_listed_as_float_with_the_reason(layer, kind, reason):
    model = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 2))
    plan = plan_layers(model, load_policy("generic"), "w4a4")[1]
    assert (plan.kind, plan.quantized) == (kind, False)
    assert reason in plan.reason
    forced = LayerPlan("1", kind, 4, 4, "forced")
    with pytest.raises(QuantizationError, match="layer '1': "):
        convert(model, [forced], TABLE)


def test_convolutions_over_one_and_three_axes_are_listed_and_low_bit():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.Linear(2, 2))
    plans = plan_layers(model, load_policy("generic"), "w4a4")
    assert [(p.kind, p.weight_bits) for p in plans][1:3] == [("conv1d", 4), ("conv3d", 4)]
    assert [layer_kind(m) for m in quantizable_layers(model).values()] == [p.kind for p in plans]
    assert all(layer_obstacle(module) is None for module in model)


LAYERS = {
    "linear": (nn.Linear(6, 4), QuantLinear, ("in_features", "out_features")),
    "conv2d": (
        nn.Conv2d(6, 4, (3, 1), stride=2, padding=(1, 0), groups=2),
        QuantConv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
}


@pytest.mark.parametrize("form", ["quantised", "deployed", "kernel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_low_bit_layer_has_the_attributes_of_its_float_layer(kind, form):
    source, layer_class, names = LAYERS[kind]
    layer = layer_class(source, TABLE)
    if form != "quantised":
        form_class = DeployedLayer if form == "deployed" else KernelLayer
        layer = form_class(LayerTensors.merge(layer), getattr(layer, "geometry", None))
        assert not any(key.endswith(".weight") or key == "weight" for key in layer.state_dict())
        layer.load_state_dict(layer.state_dict())
    for name in names:
        assert getattr(layer, name) == getattr(source, name)
    assert layer.weight.dtype == next(layer.parameters()).dtype == torch.float32
    assert torch.equal(layer.bias, source.bias)
    x = torch.randn(2, 6, 5, 6)
    assert torch.equal(layer(input=x, step=0), layer(x, 0))
    assert layer.half().weight.dtype == torch.float16


def test_a_deployed_layer_keeps_its_scales_in_a_half_precision_model():
    layer = QuantLinear(nn.Linear(6, 4), TABLE)
    layer.activation.set_range(torch.tensor([0.0123, 0.0457]), torch.full((2,), 8.0))
    tensors = LayerTensors.merge(layer)
    x = torch.randn(3, 6).half()
    expected = DeployedLayer(tensors, None)(x.float(), 1).half()
    assert torch.equal(DeployedLayer(tensors, None).half()(x, 1), expected)


def tiny_wan():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=16,
    ).eval()


def test_a_wan_transformer_with_every_layer_low_bit_answers_its_dtype_and_runs():
    model = tiny_wan()
    quantized = convert(
        model,
        plan_layers(model, load_policy("generic"), "w8a8"),
        TimestepTable([1.0, 900.0]),
        per_item=False,
    )
    for _, quantizer in quantized.activations():
        quantizer.set_range(torch.full((2,), 0.05), torch.full((2,), 128.0))
    merged = merge(quantized)
    assert set(merged) == set(quantizable_layers(tiny_wan()))
    deployed = deploy(tiny_wan(), merged, quantized.table, per_item=False)
    assert next(deployed.condition_embedder.time_embedder.parameters()).dtype == torch.float32
    assert next(deployed.parameters()).dtype == deployed.dtype == torch.float32
    x, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 16)
    outputs = []
    with torch.no_grad():
        for timestep in (torch.tensor([900]), torch.tensor([[900] * 4 + [0] * 4])):
            outputs.append(deployed(x, timestep, text, return_dict=False)[0])
    assert all(output.shape == x.shape and output.isfinite().all() for output in outputs)


class MovedNorm(nn.LayerNorm):
    """Like Stable Cascade's: normalises channels of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Norms(nn.Module):
    def __init__(self):
        from diffusers.models.normalization import FP32LayerNorm

        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.moved = MovedNorm(4)
        self.plain = nn.LayerNorm(4)
        self.exact = FP32LayerNorm(4, elementwise_affine=False)
        self.group = nn.GroupNorm(2, 4)
        self.silu = nn.SiLU()

    def forward(self, x, timestep):
        return self.proj(x)


def test_norms_with_a_forward_of_their_own_stay_and_deployed_norms_pass_isinstance():
    model = Norms()
    deploy(model, {}, TABLE)
    assert type(model.moved) is MovedNorm
    assert type(model.plain) is type(model.exact) is DeployedLayerNorm
    assert isinstance(model.plain, nn.LayerNorm)
    assert type(model.group) is DeployedGroupNorm
    assert isinstance(model.group, nn.GroupNorm)
    assert type(model.silu) is DeployedSilu
    assert (model.group.num_groups, model.group.num_channels, model.group.affine) == (2, 4, True)
    assert set(model.state_dict()) == set(Norms().state_dict())
    x = torch.randn(3, 4)
    for norm in (model.plain, model.exact, model.group):
        torch.testing.assert_close(norm(x), type(norm).__mro__[1].forward(norm, x))
    before = dict(model.named_modules())
    deploy(model, {}, TABLE)
    assert dict(model.named_modules()) == before
