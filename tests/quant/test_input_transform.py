"""Smoothing and rotation: the function of a layer stays, its ranges change."""

import copy

import pytest
import torch
from torch import nn

from trtq.errors import ArtefactError, QuantizationError
from trtq.quant import QuantConv2d, QuantLinear, TimestepTable, hadamard, step_scope
from trtq.quant.deployed import DeployedLayer
from trtq.quant.input_transform import (
    TransformTensors,
    rotation_that_fits,
    transform_layer,
    transform_obstacle,
)
from trtq.quant.tensors import LayerTensors

TABLE = TimestepTable([1, 501])


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_the_hadamard_matrix_is_regular_symmetric_and_its_own_inverse(order):
    matrix = hadamard(order)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(order))
    # Regular: equal row sums, here 1, so a common offset is not gathered in one channel.
    assert torch.equal(matrix.sum(1), torch.ones(order))
    assert set(matrix.abs().flatten().tolist()) == {order**-0.5}


@pytest.mark.parametrize("order", [0, 1, 2, 8, 12, 32, -4])
def test_other_orders_are_refused(order):
    with pytest.raises(QuantizationError, match="the order is a power of 4"):
        hadamard(order)


def test_the_largest_order_that_divides_the_channels_is_used():
    assert [rotation_that_fits(k, 256) for k in (256, 320, 1280, 80, 100)] == [256, 64, 256, 16, 0]
    assert rotation_that_fits(1280, 64) == 64


def layers():
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    yield nn.Linear(32, 5), torch.randn(2, 3, 32), QuantLinear
    for axes, kind in conv.items():
        x = torch.randn(2, 32, *(5, 4, 3)[:axes])
        yield kind(32, 6, 3, padding=1), x, QuantConv2d if axes == 2 else None


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("index", range(4))
def test_the_float_function_stays(index, rotation, smooth):
    layer, x, _ = list(layers())[index]
    layer, x = layer.double(), x.double()
    expected = layer(x)
    factors = torch.linspace(0.02, 50, 32) if smooth else None
    transform_layer(layer, TransformTensors.of_channels(factors, rotation))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer(input=x), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=1e-6, atol=1e-7)


def test_an_outlier_channel_no_longer_decides_the_scale():
    torch.manual_seed(1)
    layer, x = nn.Linear(32, 8), torch.randn(16, 32)
    x[:, 3] *= 50
    with torch.no_grad():
        layer.weight[:, 3] /= 50
    exact = layer(x).detach()

    @torch.no_grad()
    def error(source):
        quantised = QuantLinear(source, TABLE, activation_bits=4, weight_bits=8)
        seen = x if quantised.input_transform is None else quantised.input_transform(x)
        largest = seen.abs().max()
        quantised.activation.set_range(torch.full((2,), float(largest) / 7), torch.full((2,), 8.0))
        with step_scope(torch.tensor([0])):
            return float((quantised(x) - exact).square().mean())

    plain = error(copy.deepcopy(layer))
    factors = torch.ones(32)
    factors[3] = 50
    smoothed = copy.deepcopy(layer)
    transform_layer(smoothed, TransformTensors.of_channels(factors))
    assert error(smoothed) < plain / 30


@pytest.mark.parametrize("index", [0, 2])
def test_merged_layers_equal_the_trained_forward(index):
    """Same codes in training, in the merged layer and after a round trip through the file's tensors."""
    layer, x, quantised_class = list(layers())[index]
    factors = torch.linspace(0.5, 2, 32)
    transform_layer(layer, TransformTensors.of_channels(factors, 16))
    quantised = quantised_class(layer, TABLE, rank=2)
    nn.init.normal_(quantised.lora_B, std=0.05)
    quantised.activation.set_range(torch.tensor([0.3, 0.2]), torch.tensor([8.0, 7.0]))
    merged = LayerTensors.merge(quantised)
    stored = LayerTensors.from_tensors(
        merged.tensors(), channels=len(layer.weight), weight_bits=4, activation_bits=4
    )
    assert stored.transform.key == merged.transform.key
    geometry = getattr(quantised, "geometry", None)
    with step_scope(torch.tensor([1])):
        trained, deployed = quantised(x), DeployedLayer(stored, geometry)(x)
    torch.testing.assert_close(deployed, trained, rtol=1e-5, atol=1e-5)


def test_layers_in_groups_and_unfitting_channels_are_refused():
    grouped = nn.Conv2d(32, 32, 3, groups=2)
    assert transform_obstacle(grouped) == "a convolution in groups"
    with pytest.raises(QuantizationError, match="64 does not divide its 32 input channels"):
        transform_layer(nn.Linear(32, 4), TransformTensors(None, 64))
    with pytest.raises(QuantizationError, match="5 factors for 32 input channels"):
        transform_layer(nn.Linear(32, 4), TransformTensors.of_channels(torch.ones(5)))
    with pytest.raises(QuantizationError, match="mixes 16, 64, 256 channels, got 32"):
        TransformTensors(None, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform.inv_channels": torch.ones(4)}, "float16 with one axis"),
        ({"transform.inv_channels": torch.zeros(4).half()}, "factor in 0.000976562 .. 1024"),
        ({"transform.inv_channels": torch.full((4,), 1.001).half()}, "8 significant bits"),
        ({"transform.rotation": torch.tensor([32], dtype=torch.int16)}, "mixes 16, 64, 256"),
        ({"transform.rotation": torch.tensor([16])}, "one int16"),
    ],
)
def test_damaged_transforms_are_refused(change, message):
    with pytest.raises(ArtefactError, match=message):
        TransformTensors.from_tensors(change)


def test_halving_a_model_does_not_change_the_factors():
    layer = nn.Linear(32, 4)
    transform_layer(layer, TransformTensors.of_channels(torch.linspace(0.001, 1000, 32)))
    before = layer.input_transform.tensors.key
    assert layer.half().input_transform.tensors.key == before
