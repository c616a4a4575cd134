"""Fused plugins: attributes, accuracy of their functions, and the TensorRT plugin."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.plugins.emulator import needs_compiler
from tests.plugins.test_tensorrt import RTX, SAME, Desc, EmulatedDevice
from trtq.errors import UsageError
from trtq.plugins.fused import tensorrt as plugins
from trtq.plugins.fused.attributes import FUSED_FIELDS, Fusion, fused_fields, fusion_of, input_names
from trtq.plugins.fused.launches import FusedCall
from trtq.plugins.fused.reference import exponential, gelu, prepared, silu
from trtq.plugins.low_bit.reference import quantize
from trtq.plugins.spec import Geometry, LayerSpec
from trtq.selftest.fused_cases import FUSIONS, draw_fused, wanted_output

needs_rtx = pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
LINEAR = LayerSpec(64, 32, 20, 4, 8)
CONV = replace(LINEAR, geometry=SAME)
EVERYTHING = Fusion(
    "group", 4, True, True, image_shift=True, shift_first=8, residual=True, silu=True
)


@pytest.mark.parametrize(
    ("name", "layer", "fusion"),
    [
        ("FusedLinear", LINEAR, Fusion(residual=True)),
        ("FusedLinear", LINEAR, Fusion("gated", affine=True)),
        ("FusedLinear", LINEAR, Fusion(affine=True, heads=8)),
        ("FusedConv2d", CONV, EVERYTHING),
        ("FusedConv2d", CONV, Fusion(x_last=True, out_last=True)),
    ],
)
def test_attributes_restore_the_layer_and_what_is_fused(name, layer, fusion):
    fields = fused_fields(layer, fusion)
    assert {key: len(values) for key, values in fields.items()} == FUSED_FIELDS
    assert fusion_of(name, fields) == (layer, fusion)


def test_inputs_stand_in_a_fixed_order():
    names = ("x", "weight", "terms", "tables", "step")
    assert input_names(Fusion()) == names
    assert input_names(EVERYTHING) == (*names, "affine", "image_shift", "residual")


@pytest.mark.parametrize(
    ("name", "layer", "fusion"),
    [
        ("FusedLinear", LINEAR, Fusion("layer")),
        ("FusedLinear", LINEAR, Fusion("group", 4, affine=True)),
        ("FusedLinear", LINEAR, Fusion(out_last=True)),
        ("FusedConv2d", CONV, Fusion("layer", affine=True)),
        ("FusedConv2d", CONV, Fusion("group", 3, affine=True)),
        ("FusedConv2d", replace(LINEAR, geometry=Geometry(groups=2)), Fusion(affine=True)),
    ],
)
def test_what_no_kernel_computes_is_refused(name, layer, fusion):
    with pytest.raises(UsageError, match="no kernel computes Fusion"):
        fusion_of(name, fused_fields(layer, fusion))


def test_a_missing_attribute_is_named():
    fields = fused_fields(LINEAR, Fusion())
    del fields["heads"]
    with pytest.raises(UsageError, match="takes heads as 1 integer, got None; build the engine"):
        fusion_of("FusedLinear", fields)
    with pytest.raises(UsageError, match="has norms 0 to 3, got 7"):
        fusion_of("FusedLinear", fields | {"heads": [0], "norm": [7]})


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"takes \[B, 8, tokens, 8\], got \[2, 7, 64\]"):
        FusedCall.of(LINEAR, Fusion(affine=True, heads=8), (2, 7, 64))
    with pytest.raises(UsageError, match=r"takes \[B, ..., 128\], got \[2, 7, 64\]"):
        FusedCall.of(LINEAR, Fusion("gated", affine=True), (2, 7, 64))


def test_the_exponential_is_within_two_units_in_the_last_place():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exponential(x) - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    ends = exponential(np.array([-1e30, -88, 89, np.inf, np.nan], np.float32))
    clipped = exponential(np.array([-87, -87, 88, 88, -87], np.float32))
    assert np.array_equal(ends, clipped)


def test_activations_are_as_exact_as_float32_and_their_formula():
    x = np.linspace(-20, 20, 20_001, dtype=np.float32)
    exact = x.astype(np.float64)
    # The exponential has two units, the sum and the quotient half a unit each.
    wanted = exact / (1 + np.exp(-exact))
    assert (np.abs(silu(x) - wanted) <= 4 * 2.0**-23 * np.abs(wanted)).all()
    # Formula 7.1.26 has an error of 1.5e-7, and GELU half of it times x.
    wanted = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in exact])
    bound = 0.75e-7 * np.abs(exact) + 4 * 2.0**-23 * np.abs(wanted) + 2.0**-23
    assert (np.abs(gelu(x) - wanted) <= bound).all()


@pytest.mark.parametrize(
    ("norm", "shape"), [("layer", (64, 320)), ("layer", (8, 1280)), ("group", (2, 64, 32, 32))]
)
def test_codes_differ_from_exact_norms_only_at_rounding_ties(norm, shape):
    """A sum of n values in m threads has at most n / m + log2 m roundings in a row, and so the norm."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    first = norm == "group"
    channels = shape[1]
    affine = np.stack([np.ones(channels), *np.zeros((2, channels)), np.full(channels, 1e-5)])
    affine[2] = 1
    values = prepared(
        x,
        Fusion(norm, 4, affine=True),
        affine.astype(np.float32),
        channels_first=first,
    )
    rows = x.astype(np.float64).reshape((*shape[:1], 4, -1) if first else shape)
    mean = rows.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(rows.var(-1, keepdims=True) + np.float64(np.float32(1e-5)))
    exact = ((rows - mean) * inverse).reshape(shape)
    threads = 512 if first else 32
    roundings = rows.shape[-1] / threads + math.log2(threads) + 16
    # Of the sum of values, and of the sum of squares.
    bound = 2 * roundings * 2.0**-24 * (1 + np.abs(exact))
    assert (np.abs(values - exact) <= bound).all()
    scale = 2.0**-4  # Codes up to 127 hold the largest value.
    tables = np.array([[scale], [1 / scale], [-128], [127]], np.float32)
    step = np.zeros(len(x), np.int64)
    codes = quantize(values, tables, step).astype(np.float64)
    distance = np.abs(exact / scale - codes)
    assert (distance <= 0.5 + bound / scale + 2.0**-16).all()


def run_plugin(tmp_path, trt, case, fusion, operands, architecture):
    linear = case.problem.channels_last and case.problem.width == 1
    problem = case.problem
    layer = LayerSpec(
        problem.channels,
        problem.out_channels,
        problem.steps,
        case.bits,
        8,
        None if linear else problem.geometry,
    )
    device = EmulatedDevice(tmp_path, architecture)
    kind = plugins._plugin_class(trt, lambda: device)
    name = "FusedLinear" if linear else "FusedConv2d"
    plugin = kind(name, layer, fusion).attach_to_context(None)
    available = {
        "weight": case.packed,
        "terms": case.terms,
        "tables": case.tables,
        "step": case.step,
        **operands,
    }
    arrays = [np.ascontiguousarray(available[key]) for key in input_names(fusion)]
    types = {np.float16: trt.DataType.HALF, np.float32: trt.DataType.FLOAT}
    descriptions = [Desc(array.shape, types.get(array.dtype.type)) for array in arrays]
    scratch = np.empty(plugin.get_workspace_size(descriptions, []) + 256, np.uint8)
    start = scratch.ctypes.data + -scratch.ctypes.data % 256
    wanted = wanted_output(case, fusion, operands)
    out = np.full_like(wanted, np.nan)
    plugin.on_shape_change(descriptions, [])
    sources = [array.ctypes.data for array in arrays]
    plugin.enqueue(descriptions, [], sources, [out.ctypes.data], start, 77)
    assert np.array_equal(out, wanted)


@needs_rtx
@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "layer norm",
        pytest.param("heads", marks=pytest.mark.slow),
        pytest.param("group norm, SiLU, shift", marks=pytest.mark.slow),
        pytest.param("channels last out", marks=pytest.mark.slow),
    ],
)
def test_the_started_kernels_compute_the_fused_layer(tmp_path, name):
    import tensorrt_rtx as trt

    case, fusion, operands = draw_fused(name, "w8a8", True, 40)
    run_plugin(tmp_path, trt, case, fusion, operands, "sm90")


@needs_rtx
def test_inputs_have_the_types_of_the_kernels():
    import tensorrt_rtx as trt

    plugin = plugins._plugin_class(trt, lambda: None)("FusedConv2d", CONV, EVERYTHING)
    half, single = trt.DataType.HALF, trt.DataType.FLOAT
    types = [half, trt.DataType.INT8, single, single, trt.DataType.INT64, single, half, half, half]

    class Tensor:
        def __init__(self, type_):
            self.desc = Desc((), type_)
            self.desc.format = trt.TensorFormat.LINEAR

    tensors = [Tensor(type_) for type_ in types]
    assert all(plugin.supports_format_combination(i, tensors, 8) for i in range(9))
    for index in range(1, 9):
        wrong = [*tensors]
        wrong[index] = Tensor(single if types[index] == half else half)
        assert not plugin.supports_format_combination(index, wrong, 8)
    assert not plugin.supports_format_combination(0, tensors, 5)


@needs_rtx
def test_a_clone_is_the_same_plugin():
    import tensorrt_rtx as trt

    plugin = plugins._plugin_class(trt, lambda: None)("FusedConv2d", CONV, EVERYTHING)
    clone = plugin.clone()
    assert (clone.plugin_name, clone.layer, clone.fusion) == ("FusedConv2d", CONV, EVERYTHING)
    fields = {field.name: np.array(field.data).reshape(-1).tolist() for field in clone._collection}
    assert fusion_of("FusedConv2d", fields) == (CONV, EVERYTHING)


def test_every_fusion_of_the_suite_is_one_that_a_kernel_computes():
    for name, fusion in FUSIONS.items():
        rows = fusion.heads or fusion.norm == "gated" or name in ("layer norm", "rows, SiLU")
        kind = "FusedLinear" if rows else "FusedConv2d"
        layer = LINEAR if rows else CONV
        assert fusion_of(kind, fused_fields(layer, fusion)) == (layer, fusion)
