"""The benchmark against nvidia-modelopt: its verdict, what it reads in a file, its errors."""

import json
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import modelopt as benchmark


def row(by, name, snr, size, bits="w4a4", post_training=True):
    about = {"model": "digits", "by": by, "name": name, "bits": bits, "snr_db": [snr, snr]}
    about |= {"weight_bits": 4.5}
    return about | {"post_training": post_training, "bytes": size, "packed_bytes": size}


OURS = row("trtq", "trtq w4a4, search", 20.0, 100)


@pytest.mark.parametrize(
    ("rows", "worse"),
    [
        ([OURS, row("modelopt", "W4A4, max", 19.0, 500)], []),
        ([OURS, row("modelopt", "W4A4, max", 20.04, 100)], []),
        ([OURS, row("modelopt", "W4A4, max", 21.0, 500)], ["SNR 20.00 dB, not 21.00 dB"]),
        ([OURS, row("modelopt", "W4A4, max", 19.0, 99)], ["100 bytes, not 99"]),
        ([OURS, row("modelopt", "INT8, max", 40.0, 50, "w8a8")], []),
        ([OURS, row("modelopt", "W4A4, max", 21.0, 9) | {"model": "shapes"}], []),
        ([OURS, row("trtq", "x", 22.0, 90), row("modelopt", "W4A4, max", 21.0, 95)], []),
        (
            [OURS, row("trtq", "x", 22.0, 500), row("modelopt", "W4A4, max", 21.0, 95)],
            ["500 bytes"],
        ),
        ([row("trtq", "fine-tuned", 1.0, 100, post_training=False)], []),
        ([OURS, {"model": "digits", "by": "modelopt", "name": "x", "bits": "w4a4"}], []),
    ],
)
def test_rows_are_compared_at_equal_bits(rows, worse, tmp_path, monkeypatch, capsys):
    file = tmp_path / "modelopt.json"
    file.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["modelopt.py", "--check", "-o", str(file)])
    assert benchmark.main() == bool(worse)
    message = capsys.readouterr().err
    assert all(each in message for each in worse or ["nowhere worse"])


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="pip install --no-deps --target DIR nvidia-modelopt"):
        benchmark.modelopt()


def test_a_float_branch_counts_as_bits_of_the_weights():
    layers = [
        {"name": "conv_in", "weight_bits": 8},
        {"name": "time_embedding.linear_2", "weight_bits": 8},
    ]
    assert benchmark.bits_per_weight("digits", layers) == 8
    with_branch = benchmark.bits_per_weight("digits", layers[1:], rank=8)
    side = 192  # linear_2 is square: 2 x rank x side values of 16 bits for side^2 weights.
    assert with_branch == pytest.approx(8 + 16 * 2 * 8 / side)


def test_layers_have_the_bits_of_the_run():
    layers = [
        {"name": "a", "weight_bits": 4, "activation_bits": 8, "format": "int"},
        {"name": "b", "weight_bits": 8, "activation_bits": 8, "format": "fp8"},
    ]
    off, *rules = benchmark.configuration(layers, "fp8", "max", "max")["quant_cfg"]
    assert off == {"quantizer_name": "*", "enable": False}
    assert [(rule["quantizer_name"], rule["cfg"]["num_bits"]) for rule in rules] == [
        ("a.weight_quantizer", 4),
        ("a.input_quantizer", 8),
        ("b.weight_quantizer", (4, 3)),
        ("b.input_quantizer", (4, 3)),
    ]


def test_the_form_of_the_weights_in_a_file_is_named():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "s"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s"], ["wd"]),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["cd"]),
    ]
    stored = [
        helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor("codes", TensorProto.INT8, [1], [1]),
    ]
    graph = onnx.GraphProto(node=nodes, initializer=stored)
    assert benchmark.reached(graph) == (
        "1 activations with Q/DQ; 1 weights in FLOAT, with Q/DQ; 1 weights in INT8"
    )
