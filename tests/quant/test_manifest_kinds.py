"""Kinds of layers in manifests, and runs of versions that listed fewer kinds."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from torch import nn

from trtq.artefact.manifest_rows import LayerRow
from trtq.errors import ArtefactError
from trtq.quant import LayerPlan, quantizable_layers
from trtq.runs.weight_checks import check_plans

PLACE = Path("quantized.safetensors")


def row(kind, bits=4):
    return LayerRow(name="a", kind=kind, weight_bits=bits, activation_bits=bits, reason="r")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_every_kind_with_a_weight_may_be_low_bit(kind):
    assert row(kind).weight_bits == 4
    assert row(kind, None).weight_bits is None


def test_a_transposed_convolution_is_listed_as_float_only():
    assert row("conv_transpose", None).kind == "conv_transpose"
    with pytest.raises(ValidationError, match="transposed convolution, which stays float"):
        row("conv_transpose")


def test_an_earlier_manifest_need_not_list_the_new_kinds():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1))
    sources = quantizable_layers(model)
    check_plans(PLACE, [LayerPlan("0", "linear", 4, 4, "r")], sources)
    with pytest.raises(ArtefactError, match="no row for the layer '0'"):
        check_plans(PLACE, [], sources)


def test_bits_of_a_layer_that_cannot_be_low_bit_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ArtefactError, match=r"'0', which cannot be low-bit.*circular"):
        check_plans(PLACE, [LayerPlan("0", "conv2d", 4, 4, "r")], quantizable_layers(model))
