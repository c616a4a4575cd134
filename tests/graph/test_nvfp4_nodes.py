"""NVFP4 layers in the graph: standard operators equal torch, TensorRT gets its own operators."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from tests.graph.test_low_bit_layers import PER_CALL, TABLE, low_bit, sizes, values
from tests.graph.text import operators, parse
from trtq.engine.ort import session_options
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.compile import compile_engine
from trtq.engine.tensorrt.job import Job
from trtq.graph.passes import ExpandLowBitToQdq
from trtq.graph.runtimes.format_rules import architecture_findings
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import RUNTIMES, prepare
from trtq.quant.deployed import DeployedLayer
from trtq.quant.formats import layer_class
from trtq.quant.formats.e2m1 import input_numbers
from trtq.quant.formats.nvfp4 import DeployedNvfp4, Nvfp4Tensors

OUT = 20


def nvfp4(width=64, seed=0):
    torch.manual_seed(seed)
    layer = layer_class("linear", "nvfp4", None)(nn.Linear(width, OUT), TABLE)
    layer.activation.set_range(torch.tensor([1.7, 0.9, 2.3]), torch.zeros(3))
    return Nvfp4Tensors.merge(layer)


def graph(shape, kind="float"):
    out = sizes(*shape[:-1], OUT)
    model = parse(f"""g ({kind}[{sizes(*shape)}] x, float[1] t) => ({kind}[{out}] y) {{
        y = trtq.LowBitLinear <name = "a"> (x) }}""")
    ExpandLowBitToQdq({"a": nvfp4(shape[-1])}, TABLE, timestep=PER_CALL)(model)
    return model


def run(model, **feeds):
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(1), ["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("timestep", [1.0, 901.0])
def test_a_layer_from_standard_operators_equals_torch(shape, timestep, runtime, computed_vnni):
    model = prepare(graph(shape), runtime)
    x = values(*shape) * 2
    expected = DeployedNvfp4(nvfp4())(x, TABLE.index(timestep))
    (result,) = run(model, x=x.numpy(), t=np.array([timestep], np.float32))
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def test_the_numbers_of_an_input_are_those_of_torch_bit_for_bit():
    model = prepare(graph((64, 64)), "onnxruntime")
    numbers = next(node for node in model.graph if (node.name or "").endswith("/together"))
    model.graph.outputs.append(numbers.outputs[0])
    x = values(64, 64) * torch.logspace(-6, 1, 64)[:, None]
    x[0] = 0
    result = run(model, x=x.numpy(), t=np.array([501], np.float32))[1]
    expected = input_numbers(x, nvfp4().activation.inv_scale[1])
    np.testing.assert_array_equal(result, expected.numpy())


def test_the_file_holds_four_bits_and_one_byte_for_each_block():
    model = graph((2, 64))
    codes = model.graph.initializers["a/weight"].const_value
    scales = model.graph.initializers["a/block_scale"].const_value
    assert (codes.dtype, tuple(codes.shape)) == (ir.DataType.INT4, (64, OUT))
    assert (scales.dtype, tuple(scales.shape)) == (ir.DataType.FLOAT8E4M3FN, (4, OUT))
    assert "Nvfp4MatMul" in operators(model)
    assert model.opset_imports[""] == 21


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_tensorrt_gets_its_operators(shape, kind):
    model = prepare(graph(shape, kind), "tensorrt-rtx")
    quantize = next(node for node in model.graph if node.domain == "trt")
    assert quantize.op_type == "TRT_FP4DynamicQuantize"
    assert model.opset_imports[""] == 23
    assert "trtq" not in model.opset_imports
    assert model.ir_version == 11
    stored = model.graph.initializers["a/weight_fp4"].const_value
    assert stored.dtype == ir.DataType.FLOAT4E2M1
    expected = nvfp4().weight.codes.numpy().T.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), expected)
    reshapes = [
        n for n in model.graph if n.op_type == "Reshape" and (n.name or "").startswith("a/")
    ]
    assert len(reshapes) == (2 if len(shape) == 4 else 0)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_prepared_graphs_are_legal(runtime, kind):
    model = prepare(graph((2, 64), kind), runtime)
    assert not [finding for finding in check(model, runtime) if finding.fatal]


def test_nvfp4_needs_a_blackwell_card():
    model = prepare(graph((2, 64)), "tensorrt-rtx")
    rules = [finding.rule for finding in architecture_findings(model, ["sm89", "sm120"])]
    assert rules == ["sm89 cannot compute NVFP4, which needs sm100 or later"]
    assert architecture_findings(model, ["sm120", "sm121"]) == []


MIXED = """g (float[2,3,64] x, float[] t) => (float[2,3,20] a, float[2,3,20] b, float[2,3,20] c) {
    a = trtq.LowBitLinear <name = "a"> (x) b = trtq.LowBitLinear <name = "b"> (x)
    c = trtq.LowBitLinear <name = "c"> (x) }"""


def mixed():
    layers = {"a": nvfp4(), "b": nvfp4(), "c": low_bit((OUT, 64), 4)}
    model = parse(MIXED)
    ExpandLowBitToQdq(layers, TABLE, timestep=PER_CALL)(model)
    return layers, model


def test_layers_with_one_input_share_its_numbers_and_integers_have_their_own():
    layers, model = mixed()
    prepare(model, "onnxruntime")
    assert sum((node.name or "").endswith("/largest") for node in model.graph) == 1
    x = values(2, 3, 64)
    results = run(model, x=x.numpy(), t=np.array(501, np.float32))
    forms = {"a": DeployedNvfp4(layers["a"]), "b": DeployedNvfp4(layers["b"])}
    forms["c"] = DeployedLayer(layers["c"], None)
    for result, form in zip(results, forms.values(), strict=True):
        expected = form(x, TABLE.index(501.0))
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")
@pytest.mark.parametrize("rank", [3, 4])
def test_tensorrt_rtx_builds_it_next_to_integers(rank, tmp_path):
    model = mixed()[1] if rank == 3 else graph((2, 3, 4, 64), "float16")
    (tmp_path / "graph").mkdir()
    ir.save(prepare(model, "tensorrt-rtx"), tmp_path / "graph" / "model.onnx")
    job = Job(
        module="tensorrt_rtx",
        graph=tmp_path / "graph" / "model.onnx",
        engine=tmp_path / "engine",
        architectures=["sm120"],
        profiles=[],
    )
    assert compile_engine(BACKENDS["tensorrt-rtx"], job, use_cache=False).engine_bytes > 1000
