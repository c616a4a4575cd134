"""FP8 layers in the graph: codes equal to torch's, pairs for TensorRT, and their engines."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from tests.graph.test_low_bit_layers import PER_CALL, TABLE, low_bit, sizes, values
from tests.graph.test_weight_only_nodes import linear_graph
from tests.graph.text import operators, parse
from trtq.engine.ort import session_options
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.compile import compile_engine
from trtq.engine.tensorrt.job import Job
from trtq.errors import BuildError
from trtq.graph.passes import ExpandLowBitToQdq
from trtq.graph.runtimes.format_rules import architecture_findings, capable
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, prepare
from trtq.quant.deployed import DeployedLayer
from trtq.quant.formats import layer_class
from trtq.quant.formats.fp8 import DeployedFp8, Fp8Tensors, e4m3
from trtq.quant.geometry import ConvGeometry
from trtq.quant.timestep import TimestepTable

needs_rtx = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")


def fp8(source, kind="linear", seed=0):
    torch.manual_seed(seed)
    layer = layer_class(kind, "fp8", None)(source, TimestepTable([1, 501, 901]))
    layer.activation.set_range(torch.tensor([0.011, 0.0071, 0.023]), torch.zeros(3))
    return Fp8Tensors.merge(layer)


def session(model, **options):
    """A session with onnxruntime's own rewrites."""
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(1), ["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24)])
@pytest.mark.parametrize("timestep", [1.0, 501.0, 901.0])
def test_a_linear_layer_equals_torch(shape, timestep):
    layer = fp8(nn.Linear(24, 10))
    model = linear_graph(shape, 10)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    stored = model.graph.initializers["a/weight"].const_value
    assert stored.dtype == ir.DataType.FLOAT8E4M3FN
    x = values(*shape)
    feeds = {"x": x.numpy(), "t": np.array([timestep], np.float32)}
    expected = DeployedFp8(layer, None)(x, TABLE.index(timestep))
    (result,) = session(model).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def test_the_codes_are_those_of_torch_bit_for_bit():
    layer = fp8(nn.Linear(24, 10))
    model = linear_graph((64, 24), 10)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    cast = next(node for node in model.graph if node.name == "a/activation")
    model.graph.outputs.append(cast.outputs[0])
    x = values(64, 24) * 3
    feeds = {"x": x.numpy(), "t": np.array([501], np.float32)}
    codes = session(model).run(None, feeds)[1]
    expected = e4m3(x * layer.activation.inv_scale[1]).numpy()
    assert np.abs(expected).max() == 448
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_a_convolution_equals_torch(kind):
    conv, shape = {
        "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
        "conv2d": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    }[kind]
    layer, g = fp8(conv, kind), ConvGeometry.of(conv)
    x = values(*shape)
    expected = DeployedFp8(layer, g)(x, TABLE.index(901.0))
    operator = "LowBitConv2d" if kind == "conv2d" else "LowBitConv"
    model = parse(f"""g (float[{sizes(*shape)}] x, float[1] t) => (float[{sizes(*expected.shape)}] y) {{
        y = trtq.{operator} <name = "a", strides = {list(g.stride)}, group = {g.groups},
            pads = {[*g.padding, *g.padding]}, dilations = {list(g.dilation)}> (x) }}""")
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    feeds = {"x": x.numpy(), "t": np.array([901], np.float32)}
    (result,) = session(model).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


THREE = """g (float[2,3,24] x, float[] t) => (float[2,3,10] a, float[2,3,10] b, float[2,3,10] c) {
    a = trtq.LowBitLinear <name = "a"> (x) b = trtq.LowBitLinear <name = "b"> (x)
    c = trtq.LowBitLinear <name = "c"> (x) }"""


def test_layers_with_one_input_share_codes_and_integers_have_their_own():
    """The integer layer has the scales of the others, so only the type of the codes differs."""
    layers = {"a": fp8(nn.Linear(24, 10)), "b": fp8(nn.Linear(24, 10)), "c": low_bit((10, 24), 8)}
    operand = layers["c"].activation
    for name in ("scale", "inv_scale"):
        getattr(operand, name).copy_(getattr(layers["a"].activation, name))
    operand.low.fill_(-128)
    operand.high.fill_(127)
    model = parse(THREE)
    ExpandLowBitToQdq(layers, TABLE, timestep=PER_CALL)(model)
    assert operators(model).count("QuantizeLinear") == 2
    x = values(2, 3, 24)
    results = session(model).run(None, {"x": x.numpy(), "t": np.array(1, np.float32)})
    forms = {"a": DeployedFp8, "b": DeployedFp8, "c": DeployedLayer}
    for result, (name, form) in zip(results, forms.items(), strict=True):
        expected = form(layers[name], None)(x, 0)
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def test_onnxruntime_has_no_pair_of_fp8_in_front_of_a_product():
    """If this fails, a release of onnxruntime supports the pair, and the file need not have casts."""
    model = prepare(fp8_graph(), "tensorrt-rtx")
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        session(model)


def fp8_graph(kind="float", size=24):
    model = linear_graph((8, size), size, kind)
    ExpandLowBitToQdq({"a": fp8(nn.Linear(size, size))}, TABLE, timestep=PER_CALL)(model)
    return model


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_prepared_graphs_are_legal_and_tensorrt_gets_pairs(runtime, kind):
    model = prepare(fp8_graph(kind), runtime)
    assert not [finding for finding in check(model, runtime) if finding.fatal]
    pairs = 2 if runtime.startswith("tensorrt") else 0
    assert operators(model).count("DequantizeLinear") == pairs
    codes = [v.const_value for v in model.graph.initializers.values() if v.name == "a/weight"]
    assert [tensor.numpy().dtype for tensor in codes] == [ml_dtypes.float8_e4m3fn]


def test_fp8_needs_an_ada_card_or_later():
    model = prepare(fp8_graph(), "tensorrt-rtx")
    (finding,) = architecture_findings(model, ["sm75", "sm86", "sm89", "sm120", "current"])
    assert finding.layer == "a"
    assert finding.rule == "sm75, sm86 cannot compute FP8, which needs sm89 or later"
    assert not architecture_findings(model, ["sm89", "sm120", "unknown"])
    assert capable(ir.DataType.INT4, "sm80")
    assert not capable(ir.DataType.INT4, "sm75")


@needs_rtx
@pytest.mark.parametrize("architecture", ["sm86", "sm89", "sm120"])
def test_tensorrt_rtx_builds_for_ada_and_later(architecture, tmp_path):
    (tmp_path / "graph").mkdir()
    ir.save(prepare(fp8_graph("float16", 1024), "tensorrt-rtx"), tmp_path / "graph" / "model.onnx")
    job = Job(
        module="tensorrt_rtx",
        graph=tmp_path / "graph" / "model.onnx",
        engine=tmp_path / "engine",
        architectures=[architecture],
        profiles=[],
    )
    if architecture == "sm86":
        with pytest.raises(BuildError, match="HW-specific datatypes"):
            compile_engine(BACKENDS["tensorrt-rtx"], job, use_cache=False)
        return
    built = compile_engine(BACKENDS["tensorrt-rtx"], job, use_cache=False)
    assert 1024 * 1024 < built.engine_bytes < 1.6 * 1024 * 1024
