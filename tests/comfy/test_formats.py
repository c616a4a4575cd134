"""Codes, scales and packed bytes equal those of comfy-kitchen's reference backend, bit for bit."""

from __future__ import annotations

import json

import comfy_kitchen as ck
import pytest
import torch
from comfy_kitchen.backends import eager
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from trtq.comfy.decode import decode
from trtq.comfy.encode import (
    IntegerWeight,
    encode_fp8,
    encode_int4,
    encode_int8,
    encode_nvfp4,
    store_awq,
    store_int4,
    store_int8,
)
from trtq.comfy.formats import LayerFormat, StoredWeight, parse_entry
from trtq.comfy.rotation import rotate
from trtq.comfy.tiles import pack_signed, tiled, unpack_signed, untiled
from trtq.errors import ArtefactError, NonFiniteError, QuantizationError
from trtq.quant.input_transform import ROTATIONS as GROUPS
from trtq.quant.input_transform import hadamard

INT8, INT4 = "TensorWiseINT8Layout", "TensorCoreConvRotW4A4Layout"


def weight(rows=48, columns=256, seed=0):
    """A weight with rows of different sizes, an outlier, a row of zeros and values at rounding ties."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made *= torch.logspace(-3, 1, rows)[:, None]
    made[3, 5] = 40.0
    made[1] = 0.0
    made[2, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    return made


def inputs(columns=256, rows=7):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def _reference_backend():
    with ck.registry.use_backend("eager"):
        yield


def test_the_rotation_is_comfy_kitchens():
    from comfy_kitchen.tensor.int8_utils import _build_hadamard

    for group in (4, *GROUPS):
        ours = hadamard(group)
        assert torch.equal(ours, _build_hadamard(group))
        assert torch.equal(ours, ours.T)
        assert torch.allclose(ours @ ours, torch.eye(group), atol=1e-6)


@pytest.mark.parametrize("group", [0, *GROUPS])
def test_int8_codes_and_scales_are_comfy_kitchens(group):
    w = weight()
    theirs = QuantizedTensor.from_float(
        w, INT8, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256
    )
    ours = store_int8(encode_int8(w, group)).tensors
    assert torch.equal(ours["weight"], theirs._qdata)
    assert torch.equal(ours["weight_scale"], theirs.params.scale)
    assert ours["weight_scale"].shape == theirs.params.scale.shape


@pytest.mark.parametrize("group", GROUPS)
def test_int4_codes_and_scales_are_comfy_kitchens(group):
    w = weight()
    theirs = QuantizedTensor.from_float(w, INT4, convrot_groupsize=group)
    ours = store_int4(encode_int4(w, group)).tensors
    assert torch.equal(ours["weight"], theirs._qdata)
    assert torch.equal(ours["weight_scale"], theirs.params.scale)


@pytest.mark.parametrize("shape", [(48, 256), (16, 16), (144, 80)], ids=str)
def test_fp8_and_nvfp4_bytes_are_comfy_kitchens(shape):
    w = weight(*shape)
    fp8 = encode_fp8(w).tensors
    theirs, params = get_layout_class("TensorCoreFP8Layout").quantize(w)
    assert torch.equal(fp8["weight"].view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(fp8["weight_scale"], params.scale)
    nvfp4 = encode_nvfp4(w).tensors
    theirs, params = get_layout_class("TensorCoreNVFP4Layout").quantize(w)
    assert torch.equal(nvfp4["weight"], theirs)
    assert torch.equal(nvfp4["weight_scale_2"], params.scale)
    ours, scales = nvfp4["weight_scale"], params.block_scale
    assert ours.shape == scales.shape
    assert torch.equal(ours.view(torch.uint8), scales.view(torch.uint8))


def test_nvfp4_rounds_ties_to_the_even_code():
    w = torch.zeros(16, 16)
    middles = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -0.75, -1.25]
    w[0] = torch.tensor([*middles, 0.2, 0.3, 4.9, 5.1]) * 448
    theirs, _ = get_layout_class("TensorCoreNVFP4Layout").quantize(w)
    stored = encode_nvfp4(w)
    assert torch.equal(stored.tensors["weight"], theirs)
    expected = [6, 0, 1, 1, 2, 2, 4, 4, -6, 0, -1, -1, 0, 0.5, 4, 6]
    assert (decode(stored)[0] / 448).tolist() == pytest.approx(expected)


def stored_weights(w):
    yield "int8", store_int8(encode_int8(w)), INT8
    for group in GROUPS:
        yield f"int8 {group}", store_int8(encode_int8(w, group)), INT8
        yield f"int4 {group}", store_int4(encode_int4(w, group)), INT4
    yield "fp8", encode_fp8(w), "TensorCoreFP8Layout"
    yield "nvfp4", encode_nvfp4(w), "TensorCoreNVFP4Layout"


def as_theirs(stored, shape, layout):
    """The weight as comfy-kitchen's tensor, from tensors and entry only, as ComfyUI makes it."""
    tensors = stored.tensors
    entry = json.loads(bytes(stored.format.entry().tolist()))
    options = {"orig_dtype": torch.float32, "orig_shape": tuple(shape)}
    if layout == "TensorCoreNVFP4Layout":
        options |= {"scale": tensors["weight_scale_2"], "block_scale": tensors["weight_scale"]}
    else:
        options |= {"scale": tensors["weight_scale"]}
    options |= {k: v for k, v in entry.items() if k != "format"}
    return QuantizedTensor(tensors["weight"], layout, get_layout_class(layout).Params(**options))


def test_every_format_decodes_to_what_comfy_kitchen_decodes():
    w = weight()
    for name, stored, layout in stored_weights(w):
        assert torch.equal(decode(stored), as_theirs(stored, w.shape, layout).dequantize()), name


def test_mxfp8_and_one_scale_per_tensor_are_decoded():
    w = weight(64, 64)
    codes, params = get_layout_class("TensorCoreMXFP8Layout").quantize(w)
    stored = StoredWeight(LayerFormat("mxfp8"), {"weight": codes, "weight_scale": params.scale})
    expected = get_layout_class("TensorCoreMXFP8Layout").dequantize(codes, params)
    assert torch.equal(decode(stored), expected.float())
    theirs = QuantizedTensor.from_float(w, INT8)
    tensors = {"weight": theirs._qdata, "weight_scale": theirs.params.scale}
    stored = StoredWeight(LayerFormat("int8_tensorwise"), tensors)
    assert torch.equal(decode(stored), theirs.dequantize())


@pytest.mark.parametrize("group", [0, *GROUPS])
def test_comfy_kitchen_computes_with_our_codes_what_the_format_says(group):
    """`y = (q_x q_w) s_x s_w + b` with `s_x = max|x| / 127` per row of the (rotated) input."""
    w, x, bias = weight(), inputs(), torch.linspace(-1, 1, 48)
    stored = store_int8(encode_int8(w, group))
    theirs = torch.nn.functional.linear(x, as_theirs(stored, w.shape, INT8), bias)
    turned = rotate(x, group) if group else x
    scale = turned.abs().amax(1, keepdim=True) / 127
    codes = (turned / scale).round()
    integers = codes.double() @ stored.tensors["weight"].double().T
    ours = integers.float() * (scale * stored.tensors["weight_scale"].T) + bias
    assert torch.equal(theirs, ours)
    assert torch.allclose(theirs, x @ w.T + bias, atol=0.02 * float((x @ w.T).abs().max()))


@pytest.mark.parametrize("group", GROUPS)
def test_comfy_kitchen_computes_with_our_4_bit_codes_what_the_format_says(group):
    w, x, bias = weight(), inputs(), torch.linspace(-1, 1, 48)
    stored = store_int4(encode_int4(w, group))
    theirs = torch.nn.functional.linear(x, as_theirs(stored, w.shape, INT4), bias)
    turned = rotate(x, group)
    scale = turned.abs().amax(1, keepdim=True) / 7
    codes = (turned / scale).round().clamp(-7, 7)
    integers = codes @ unpack_signed(stored.tensors["weight"]).float().T
    assert torch.equal(theirs, integers * scale * stored.tensors["weight_scale"] + bias)


@pytest.mark.parametrize("group", [32, 64])
def test_grouped_4_bit_codes_are_decoded_as_comfy_kitchen_decodes_them(group):
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(-8, 8, (12, 128), generator=generator).to(torch.int8)
    scale = torch.rand(12, 128 // group, generator=generator)
    weight = IntegerWeight(codes, scale, group=group)
    stored = store_awq(weight)
    layout = get_layout_class("TensorCoreAWQW4A16Layout")
    zeros = torch.randn(stored.tensors["weight_zeros"].shape, generator=generator)
    for offset in (stored.tensors["weight_zeros"], zeros):
        tensors = {**stored.tensors, "weight_zeros": offset}
        params = layout.Params(
            scale=tensors["weight_scale"],
            zeros=offset,
            group_size=group,
            orig_dtype=torch.float32,
            orig_shape=(12, 128),
        )
        theirs = QuantizedTensor(tensors["weight"], "TensorCoreAWQW4A16Layout", params)
        ours = decode(StoredWeight(parse_entry(stored.format.entry()), tensors))
        assert torch.equal(ours, theirs.dequantize())
        x = inputs(128)
        assert torch.equal(torch.nn.functional.linear(x, theirs), x @ ours.T)
    assert torch.equal(decode(stored), weight.dequantize())


def test_packing_and_tiles_are_their_own_inverses_and_comfy_kitchens():
    from comfy_kitchen.backends.eager.svdquant import _pack_int4_row_major
    from comfy_kitchen.float_utils import to_blocked

    codes = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert torch.equal(pack_signed(codes), _pack_int4_row_major(codes))
    assert torch.equal(unpack_signed(pack_signed(codes)), codes)
    for shape in ((1, 1), (128, 4), (130, 6), (300, 17)):
        matrix = torch.arange(shape[0] * shape[1]).reshape(shape).float()
        assert torch.equal(tiled(matrix), to_blocked(matrix, flatten=False))
        assert torch.equal(untiled(tiled(matrix), *shape), matrix)


def test_an_input_scale_of_smoothing_is_multiplied_into_the_weight():
    w = weight()
    stored = encode_nvfp4(w)
    scale = torch.rand(256) + 0.5
    smoothed = StoredWeight(stored.format, {**stored.tensors, "pre_quant_scale": scale})
    assert torch.equal(decode(smoothed), decode(stored) * scale)


def test_a_weight_of_zeros_is_zero_in_every_format():
    for _, stored, _ in stored_weights(torch.zeros(32, 256)):
        assert not decode(stored).any()


def test_entries_name_format_and_rotation():
    for stored_format in (
        LayerFormat("int8_tensorwise"),
        LayerFormat("int8_tensorwise", 64),
        LayerFormat("convrot_w4a4", 16),
        LayerFormat("nvfp4"),
        LayerFormat("awq_w4a16", group=32),
        LayerFormat("int8_tensorwise", 16, float_input=True),
    ):
        assert parse_entry(stored_format.entry()) == stored_format
    nested = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
    assert parse_entry(nested) == LayerFormat("int8_tensorwise", 64)
    assert parse_entry({"format": "int8_tensorwise", "convrot": True}).rotation == 256
    assert parse_entry({"format": "convrot_w4a4"}).rotation == 256
    assert parse_entry({"format": "awq_w4a16"}).group == 64
    named = store_int8(encode_int8(weight(), 64)).entries("blocks.0.q")
    assert sorted(named) == [
        "blocks.0.q.comfy_quant",
        "blocks.0.q.weight",
        "blocks.0.q.weight_scale",
    ]


def entry(text):
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"format": "int3"},
            "its format is 'int3', which trtq does not read; it reads int8_tensorwise",
        ),
        ({}, "its format is None"),
        ({"format": ["nvfp4"]}, "its format is"),
        ({"format": "convrot_w4a4", "convrot_groupsize": 32}, "is 32, which is no power of 4"),
        ({"format": "convrot_w4a4", "convrot_groupsize": "64"}, "is '64'"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": -4}, "is -4"),
        (
            {"format": "awq_w4a16", "group_size": 0},
            "its group_size is 0, which is no number of inputs",
        ),
        (entry(b"[1]"), "not a JSON object"),
        (entry(b"{"), "is not JSON"),
        (entry(b"\xff"), "is not JSON"),
        (entry(b"[" * 20000), "is not JSON"),
        (torch.zeros(3), "not JSON as bytes"),
        (torch.zeros(1 << 17, dtype=torch.uint8), "not JSON as bytes"),
    ],
    ids=str,
)
def test_an_entry_that_says_nothing_is_refused(content, message):
    with pytest.raises(ArtefactError) as caught:
        parse_entry(content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(3)}, "1 or 48 floating-point numbers are required"),
        ({"weight_scale": torch.full((48, 1), torch.nan)}, "holds nan"),
        ({"weight_scale": torch.full((48, 1), -1.0)}, "holds -1.0"),
        ({"weight_scale": torch.ones(48, dtype=torch.int32)}, "floating-point"),
        ({"pre_quant_scale": torch.ones(3)}, "not one finite number per input"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_are_refused(change, message):
    stored = store_int8(encode_int8(weight()))
    with pytest.raises(ArtefactError, match=message):
        decode(StoredWeight(stored.format, {**stored.tensors, **change}))


def test_what_a_format_cannot_hold_is_refused():
    with pytest.raises(QuantizationError, match="does not fit 100 input channels"):
        encode_int8(torch.ones(4, 100), 16)
    with pytest.raises(QuantizationError, match="multiple of 64 inputs"):
        store_int4(encode_int4(torch.ones(4, 16), 16))
    wide = torch.tensor([[-8, 8] * 32], dtype=torch.int8)
    with pytest.raises(QuantizationError, match=r"-8 \.\. 7, got -8 \.\. 8"):
        store_int4(IntegerWeight(wide, torch.ones(1, 1), 64))
    with pytest.raises(QuantizationError, match="groups of inputs, without rotation"):
        store_awq(IntegerWeight(wide, torch.ones(1, 1)))
    with pytest.raises(QuantizationError, match=r"-8 \.\. 7"):
        store_awq(IntegerWeight(wide, torch.ones(1, 1), group=64))
    grouped = LayerFormat("awq_w4a16", group=48)
    codes = {"weight": torch.zeros(2, 32, dtype=torch.int8), "weight_scale": torch.ones(1, 2)}
    with pytest.raises(ArtefactError, match="its 64 inputs are no multiple of its group_size 48"):
        decode(StoredWeight(grouped, codes | {"weight_zeros": torch.zeros(1, 2)}))
    whole = LayerFormat("awq_w4a16", group=64)
    with pytest.raises(ArtefactError, match="are not 2 finite numbers"):
        decode(StoredWeight(whole, codes | {"weight_zeros": torch.zeros(1, 3)}))
    with pytest.raises(QuantizationError, match="got 17 and 16"):
        encode_nvfp4(torch.ones(17, 16))
    with pytest.raises(QuantizationError, match="2 axes"):
        encode_fp8(torch.ones(4, 4, 1, 1))
    for make in (encode_int8, encode_fp8, encode_nvfp4):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            make(torch.full((16, 16), torch.inf))
    scales = encode_nvfp4(weight())
    changed = {**scales.tensors, "weight_scale": scales.tensors["weight_scale"][:64]}
    with pytest.raises(ArtefactError, match=r"\[128, 16\] is required"):
        decode(StoredWeight(scales.format, changed))


def test_the_reference_backend_is_the_one_compared_with():
    assert ck.registry.get_implementation("int8_linear") is eager.int8_linear
