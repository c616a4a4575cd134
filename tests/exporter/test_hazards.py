"""Exported graphs never contain constructs that TensorRT silently computes wrongly.

The constructs were found in TensorRT-RTX 1.7: sums of integers in float16, block scales that are moved
behind the product, activations scaled in blocks, INT4 weights of INT8 convolutions.
"""

import numpy as np
import onnx_ir as ir
import pytest

from tests.conftest import tiny_pipeline
from trtq.artefact.opened import open_artefact
from trtq.exporter.export import _write_denoiser
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.runs.quantize import quantize

PAIR = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for bits in ("w8a8", "w4a4"):
        recipe = {"method": "search", "bits": bits, "steps": 2, "calibration": {"images": 4}}
        quantize(tiny_pipeline(), recipe, place / bits)
    return place


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def bits(request):
    return request.param


@pytest.fixture(scope="module", params=["qdq", "plugin"])
def built_graph(runs, bits, request, tmp_path_factory):
    """The half-precision graph, prepared for TensorRT."""
    out = tmp_path_factory.mktemp("onnx") / "onnx"
    # With random weights, parity in half precision at 4 bits is a matter of chance, so the graph is
    # written without it; the tests are about the graph's structure.
    _write_denoiser(open_artefact(runs / bits), out, "fp16", request.param, None)
    return prepare(load_graph(out / "unet" / "model.onnx"), "tensorrt-rtx")


def test_no_sum_of_integers_is_kept_in_half_precision(built_graph):
    for node in built_graph.graph:
        if node.op_type in PAIR:
            assert node.inputs[1].const_value.dtype == ir.DataType.FLOAT
        if node.domain == "trtq":
            assert [value.dtype for value in node.inputs[2:4]] == [ir.DataType.FLOAT] * 2


def test_nothing_is_scaled_in_blocks(built_graph):
    for node in built_graph.graph:
        assert "block_size" not in node.attributes


def test_activations_have_one_constant_scale(built_graph):
    for node in built_graph.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[1].const_value.size == 1


def test_no_four_bit_constant_is_an_operand_of_an_integer_product(built_graph):
    stored = built_graph.graph.initializers.values()
    assert not any(
        value.const_value.dtype in (ir.DataType.INT4, ir.DataType.UINT4) for value in stored
    )


def test_the_checker_finds_no_problem(built_graph):
    assert check(built_graph, "tensorrt-rtx") == []
    weights = [
        value.const_value
        for value in built_graph.graph.initializers.values()
        if value.const_value.dtype == ir.DataType.INT8 and value.const_value.size > 1
    ]
    assert weights
    assert all(weight.numpy().dtype == np.int8 for weight in weights)
