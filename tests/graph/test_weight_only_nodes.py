"""Weight-only layers in the graph: the form, its numbers in every runtime, and its engines."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.graph.test_low_bit_layers import PER_CALL, TABLE, low_bit, sizes, values
from tests.graph.text import operators, parse, run
from trtq.engine.ort import session_options
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.compile import compile_engine
from trtq.engine.tensorrt.job import Job
from trtq.graph.passes import ExpandLowBitToQdq, LowBitToPlugins
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, prepare
from trtq.quant.deployed import DeployedLayer
from trtq.quant.formats.weight_only import DeployedWeightOnly, GroupedWeight, WeightOnlyTensors
from trtq.quant.geometry import ConvGeometry


def weight_only(shape, group=None, bits=4, bias=True):
    rng = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, shape, generator=rng).to(torch.uint8)
    scales = (shape[0], shape[1] // group) if group else (shape[0], *[1] * (len(shape) - 1))
    scale = (torch.rand(scales, generator=rng) * 0.1 + 0.01).half().float()
    weight = GroupedWeight.of(
        codes, scale, torch.full_like(scale, 2.0 ** (bits - 1)), bits, group=group
    )
    return WeightOnlyTensors(weight, torch.randn(shape[0], generator=rng) if bias else None)


def linear_graph(shape, channels, kind="float"):
    out = sizes(*shape[:-1], channels)
    return parse(f"""g ({kind}[{sizes(*shape)}] x, float[1] t) => ({kind}[{out}] y) {{
        y = trtq.LowBitLinear <name = "a"> (x) }}""")


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 128)])
def test_a_linear_layer_equals_torch(shape, bits, group):
    layer = weight_only((10, 128), group, bits)
    model = linear_graph(shape, 10)
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    assert operators(model) == ["DequantizeLinear", "MatMul", "Add"]
    stored = model.graph.initializers["a/weight"].const_value
    assert stored.dtype == (ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
    x = values(*shape)
    result = run(model, x=x.numpy(), t=np.ones(1, np.float32))[0]
    expected = DeployedWeightOnly(layer, None)(x)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-4)


def test_half_precision_graphs_hold_the_same_scales():
    layer = weight_only((10, 64), 32)
    model = linear_graph((2, 64), 10, "float16")
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    assert "Cast" not in operators(model)
    scale = model.graph.initializers["a/weight_scale"].const_value.numpy()
    assert scale.dtype == np.float16
    np.testing.assert_array_equal(scale.T.astype(np.float32), layer.weight.scale.numpy())
    x = values(2, 64).half()
    result = run(model, x=x.numpy(), t=np.ones(1, np.float32))[0].astype(np.float32)
    expected = DeployedWeightOnly(layer, None)(x.float())
    assert float((torch.from_numpy(result) - expected).abs().max()) < 0.02


def test_a_convolution_equals_torch():
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2)
    layer = weight_only(tuple(conv.weight.shape))
    model = parse("""g (float[2,4,5,5] x, float[1] t) => (float[2,6,5,5] y) {
        y = trtq.LowBitConv2d <name = "a", strides = [1, 1], group = 2, pads = [1, 1, 1, 1],
            dilations = [1, 1]> (x) }""")
    ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
    x = values(2, 4, 5, 5)
    result = run(model, x=x.numpy(), t=np.ones(1, np.float32))[0]
    expected = DeployedWeightOnly(layer, ConvGeometry.of(conv))(x)
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-4)


MIXED = """g (float[2,3,64] x, float[] t) => (float[2,3,64] y, float[2,3,64] z) {
    y = trtq.LowBitLinear <name = "a"> (x) z = trtq.LowBitLinear <name = "b"> (x) }"""


def mixed_layers():
    return {"a": low_bit((64, 64), 8), "b": weight_only((64, 64), 32)}


def mixed_graph():
    model = parse(MIXED)
    ExpandLowBitToQdq(mixed_layers(), TABLE, timestep=PER_CALL)(model)
    return model


def mixed_result(x):
    layers = mixed_layers()
    y = DeployedLayer(layers["a"], None)(x, TABLE.index(501.0))
    return y, DeployedWeightOnly(layers["b"], None)(x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_integers_and_weight_only_layers_share_a_graph(runtime, computed_vnni):
    """With onnxruntime's default accuracy level MatMulNBits would quantise activations, to 45 dB."""
    model = prepare(mixed_graph(), runtime)
    assert not [finding for finding in check(model, runtime) if finding.fatal]
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(1), ["CPUExecutionProvider"]
    )
    x = values(2, 3, 64)
    results = session.run(None, {"x": x.numpy(), "t": np.array(501, np.float32)})
    for result, expected in zip(results, mixed_result(x), strict=True):
        error = (torch.from_numpy(result) - expected).square().sum() / expected.square().sum()
        assert float(error) < 1e-10


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_weight_only_layers_are_legal_everywhere(runtime, kind):
    for bits in (4, 8):
        model = linear_graph((2, 64), 10, kind)
        ExpandLowBitToQdq({"a": weight_only((10, 64), None, bits)}, TABLE, timestep=PER_CALL)(model)
        assert check(prepare(model, runtime), runtime) == []


def test_full_tensorrt_has_no_groups_of_8_bit_codes():
    for runtime, findings in (("tensorrt", 1), ("tensorrt-rtx", 0)):
        model = linear_graph((2, 64), 10)
        ExpandLowBitToQdq({"a": weight_only((10, 64), 32, 8)}, TABLE, timestep=PER_CALL)(model)
        rules = [finding for finding in check(prepare(model, runtime), runtime) if finding.fatal]
        assert len(rules) == findings
        assert all("blocks of INT8" in finding.rule for finding in rules)


def test_the_plugins_leave_weight_only_layers_to_the_engine():
    model, layers = parse(MIXED), mixed_layers()
    ExpandLowBitToQdq(layers, TABLE, (), timestep=PER_CALL)(model)
    LowBitToPlugins(layers, TABLE, timestep=PER_CALL)(model)
    assert operators(model).count("LowBitLinear") == 1
    assert operators(model).count("DequantizeLinear") == 1


@pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")
def test_tensorrt_rtx_builds_with_weights_in_4_bits(tmp_path):
    sides = {4: 0, 16: 0}
    for bits in sides:
        if bits == 4:
            model = linear_graph((8, 2048), 2048, "float16")
            layer = weight_only((2048, 2048), 64)
            ExpandLowBitToQdq({"a": layer}, TABLE, timestep=PER_CALL)(model)
        else:
            weight = np.ones((2048, 2048), np.float16) / 3
            model = parse(
                "g (float16[8,2048] x, float[1] t) => (float16[8,2048] y) { y = MatMul(x, w) }",
                w=weight,
            )
        prepare(model, "tensorrt-rtx")
        folder = tmp_path / str(bits)
        folder.mkdir()
        ir.save(model, folder / "model.onnx")
        job = Job(
            module="tensorrt_rtx",
            graph=folder / "model.onnx",
            engine=tmp_path / f"{bits}.engine",
            architectures=["sm86"],
            profiles=[],
        )
        compiled = compile_engine(BACKENDS["tensorrt-rtx"], job, use_cache=False)
        sides[bits] = compiled.engine_bytes
    assert sides[4] < 0.32 * sides[16]
