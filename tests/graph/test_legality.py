"""Every known hazard of a runtime is found and has a fix; exported graphs have no hazard."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from trtq.graph.runtimes.int4_to_int8 import CastInt4ToInt8
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, prepare

TENSORRT = ("tensorrt", "tensorrt-rtx")


def parse(body, **constants):
    """Parse a graph in ONNX's text format, and name the nodes after their outputs."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {body}')
    for name, data in constants.items():
        tensor = data if isinstance(data, ir.Tensor) else ir.tensor(data, name=name)
        value = next(
            v for node in model.graph for v in node.inputs if v is not None and v.name == name
        )
        value.const_value, value.shape = tensor, ir.Shape(list(tensor.shape))
        value.type = ir.TensorType(tensor.dtype)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = f"layer/{node.outputs[0].name}"
        for value in node.outputs:
            if node.op_type == "Cast":
                value.type = ir.TensorType(ir.DataType(node.attributes["to"].as_int()))
    return model


def int4(shape):
    codes = np.arange(np.prod(shape)).reshape(shape) % 15 - 7
    return ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)


UNIT = np.array(1.0, np.float32)
BROKEN = {
    "decomposed integers": (
        "g (int8[2,3] a) => (int32[2,4] y) { y = MatMulInteger(a, w) }",
        {"w": np.ones((3, 4), np.int8)},
        "MatMulInteger, which is not among",
    ),
    "float64": (
        "g (float[2] x) => (double[2] y) { y = Cast <to = 11> (x) }",
        {},
        "float64",
    ),
    "zero point": (
        "g (float[2] x) => (int8[2] y) { y = QuantizeLinear(x, one, z) }",
        {"one": UNIT, "z": np.array(3, np.int8)},
        "zero point that is not a constant zero",
    ),
    "unsigned": (
        "g (float[2] x) => (uint8[2] y) { y = QuantizeLinear(x, one, z) }",
        {"one": UNIT, "z": np.array(0, np.uint8)},
        "unsigned",
    ),
    "computed scale": (
        "g (float[2] x, float s) => (int8[2] y) { t = Mul(s, s) y = QuantizeLinear(x, t, z) }",
        {"z": np.array(0, np.int8)},
        "ends the builder's process",
    ),
    "scale per channel of an activation": (
        "g (float[2,3] x) => (int8[2,3] y) { y = QuantizeLinear <axis = 1> (x, s) }",
        {"s": np.ones(3, np.float32)},
        "an activation has 3 scales",
    ),
    "float16 scale": (
        "g (float16[2] x) => (int8[2] y) { y = QuantizeLinear(x, one, z) }",
        {"one": np.array(1.0, np.float16), "z": np.array(0, np.int8)},
        "65504",
    ),
    "INT4 into a Cast": (
        "g (float[2] x) => (int8[2,4] y) { y = Cast <to = 3> (w) }",
        {"w": int4((2, 4))},
        "INT4 constant feeds Cast",
    ),
    "INT4 weight, INT8 activation": (
        "g (int8[2,4] a) => (float[2,2] y) { x = DequantizeLinear(a, one) "
        "v = DequantizeLinear <axis = 1> (w, s) y = MatMul(x, v) }",
        {"one": UNIT, "w": int4((4, 2)), "s": np.ones(2, np.float32)},
        "INT4 weights with quantised activations",
    ),
}


@pytest.mark.parametrize("hazard", BROKEN)
@pytest.mark.parametrize("runtime", TENSORRT)
def test_tensorrt_refuses_a_broken_graph(hazard, runtime):
    body, constants, message = BROKEN[hazard]
    findings = check(parse(body, **constants), runtime)
    (finding,) = [finding for finding in findings if message in finding.rule]
    assert finding.fatal
    assert finding.layer == "layer"
    assert finding.fix


LARGE = {
    "one": UNIT,
    "zero": np.array(0, np.int8),
    "w": np.full((3, 4), 100, np.int8),
    "s": np.ones(4, np.float32),
}
LARGE_PAIR = (
    "g (int8[2,3] a) => (float[2,4] y) {{ x = {} "
    "v = DequantizeLinear <axis = 1> (w, s) y = MatMul(x, v) }}"
)


@pytest.mark.parametrize("pair", ["a, one, zero", "a, one"], ids=["zero point", "none"])
def test_saturating_pairs_are_reported_if_the_processor_saturates(pair, vnni):
    """onnxruntime 1.31 rewrites both forms to a uint8 pair."""
    body = LARGE_PAIR.format(f"DequantizeLinear({pair})")
    constants = {name: LARGE[name] for name in LARGE if name in pair or name in "ws"}
    assert len(check(parse(body, **constants), "onnxruntime")) == (0 if vnni else 1)


def test_a_dequantised_weight_with_a_float_activation_is_reported():
    body = LARGE_PAIR.format("Cast <to = 1> (a)")
    (finding,) = check(parse(body, w=LARGE["w"], s=LARGE["s"]), "onnxruntime")
    assert "1.31 quantises itself" in finding.rule
    assert finding.fatal


def test_compilers_compute_cast_codes_in_float(digits_onnx):
    model = ir.load(digits_onnx / "unet" / "model.onnx")
    for runtime in ("tensorrt-rtx", "openvino"):
        rules = Counter(f.rule for f in check(model, runtime) if "cast, not dequantised" in f.rule)
        # Both layers of the time embedding, and the layers that share their quantiser.
        assert sum(rules.values()) >= 2


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_prepared_exports_are_legal_everywhere(runtime, vnni, digits_onnx):
    model = prepare(ir.load(digits_onnx / "unet" / "model.onnx"), runtime)
    findings = check(model, runtime)
    assert not [finding for finding in findings if finding.fatal]
    in_float = {finding.layer for finding in findings}
    if runtime == "openvino" and not vnni:
        # The 8-bit layers of a W4A4 model, except those whose integers happen to be small.
        assert "conv_in" in in_float
        assert len(in_float) <= 12
    else:
        assert not in_float


def test_an_unprepared_export_is_not_legal_for_tensorrt(digits_onnx):
    findings = check(ir.load(digits_onnx / "unet" / "model.onnx"), "tensorrt-rtx")
    rules = " ".join(finding.rule for finding in findings)
    assert "float64" in rules
    assert "INT4 constant feeds Cast" in rules


def test_weights_cast_to_int8_have_the_same_integers(digits_onnx):
    path = digits_onnx / "unet" / "model.onnx"
    model = ir.load(path)
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32),
        "timestep": np.array([1, 700], np.float32),
        "class_labels": np.array([1, 2]),
    }
    shape = model.graph.inputs[0].shape
    feeds["sample"] = feeds["sample"][:, :, : shape[2], : shape[3]]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    outputs = []
    for cast in (False, True):
        if cast:
            assert CastInt4ToInt8()(model).modified
            assert not CastInt4ToInt8()(model).modified
            kinds = {v.dtype for v in model.graph.initializers.values() if v.uses()}
            assert ir.DataType.INT4 not in kinds
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        outputs.append(session.run(None, feeds)[0])
    np.testing.assert_array_equal(*outputs)
