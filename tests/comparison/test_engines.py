"""Engines as sides of a comparison, with a fake of TensorRT; and the plan of a build."""

from types import SimpleNamespace

import numpy as np
import pytest
from polygraphy.backend.trt import TrtRunner
from polygraphy.comparator import Comparator

from tests.engine.fake_tensorrt import Memory, fake_module
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import SourceRow
from trtq.artefact.opened import EngineFolder
from trtq.comparison.compare import compare
from trtq.comparison.runners import EngineRunner, engine_runner
from trtq.comparison.sides import ordered_sides
from trtq.engine.extras import EXTRAS, installed_extras
from trtq.engine.tensorrt import run as running
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.engine.tensorrt.job import Answer
from trtq.engine.tensorrt.precisions import engine_precisions, network_precisions, shortfall
from trtq.engine.tensorrt.run import TensorRtEngine
from trtq.errors import BuildError, UsageError
from trtq.exporter.build_targets import check_plan


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(running, "register", lambda trt: None)
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


def test_an_engine_of_tensorrt_rtx_is_a_runner_of_polygraphy(file):
    engine = TensorRtEngine(file, BACKENDS["tensorrt-rtx"], fake_module(), Memory())
    runner = engine_runner("engine", engine)
    assert isinstance(runner, EngineRunner)
    feeds = [{"x": np.full((batch, 3), batch, np.float32)} for batch in (1, 4)]
    results = Comparator.run([runner], data_loader=feeds)
    for feed, result in zip(feeds, results["engine"], strict=True):
        np.testing.assert_array_equal(result["y"], feed["x"] + 1)
        assert result.runtime > 0


def test_an_engine_of_full_tensorrt_runs_in_polygraphys_own_runner(file):
    module = fake_module()
    del module.CudaGraphStrategy
    module.engine.create_execution_context = lambda self: SimpleNamespace()
    engine = TensorRtEngine(file, BACKENDS["tensorrt"], module, Memory())
    runner = engine_runner("engine", engine)
    assert isinstance(runner, TrtRunner)
    assert runner.name == "engine"


def engine_folder(tmp_path, version):
    manifest = Manifest(
        kind="engine",
        files={"unet/model.engine": "0" * 64},
        source=SourceRow(name="onnx", files={}),
        denoiser="unet",
        options={"backend": "tensorrt-rtx", "version": version},
    )
    return EngineFolder(tmp_path, tmp_path, manifest)


@pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")
def test_an_engine_of_another_version_is_refused_in_one_line(tmp_path, digits_run):
    with pytest.raises(UsageError, match=r"was built by tensorrt-rtx 1\.6\.0, and .* is installed"):
        ordered_sides(engine_folder(tmp_path, "1.6.0"), digits_run)
    folder = engine_folder(tmp_path, BACKENDS["tensorrt-rtx"].version)
    reference, other = ordered_sides(folder, digits_run)
    assert other.provider == "tensorrt-rtx"
    assert reference.label == f"{digits_run.name} (torch)"
    with pytest.raises(UsageError, match="run it with tensorrt-rtx, not cpu"):
        ordered_sides(folder, digits_run, ("cpu", None))


@pytest.mark.parametrize("option", ["layers", "bisect"])
def test_the_layers_of_engines_are_refused_before_anything_is_opened(
    option, tmp_path, digits_run, monkeypatch
):
    monkeypatch.setattr("trtq.comparison.sides.open_any", None)
    folder = engine_folder(tmp_path, None)
    with pytest.raises(UsageError) as caught:
        compare(folder, digits_run, **{option: True})
    assert str(caught.value) == (
        f"--{option} needs the layers, and {tmp_path.name} (tensorrt-rtx) is a folder of engines, "
        "which hide them; compare the graphs that they were built from, on the CPU: trtq verify onnx "
        f"--against RUN --{option}"
    )


KINDS = SimpleNamespace(
    **{
        name: name
        for name in [
            "CONVOLUTION",
            "MATRIX_MULTIPLY",
            "PLUGIN_V3",
            "DEQUANTIZE",
            "QUANTIZE",
            "SHUFFLE",
            "CAST",
            "IDENTITY",
            "CONSTANT",
        ]
    }
)


class Layer:
    def __init__(self, kind, name, inputs=(), dtype="FLOAT"):
        self.type, self.name, self.inputs, self.num_outputs = kind, name, inputs, 1
        self.output = SimpleNamespace(name=f"{name}:0", dtype=SimpleNamespace(name=dtype))

    def get_output(self, index):
        return self.output

    def get_input(self, index):
        return self.inputs[index].output


class Network:
    def __init__(self, *layers):
        self.layers = layers
        self.num_layers = len(layers)

    def get_layer(self, index):
        return self.layers[index]


def product(name, first, second, kind="MATRIX_MULTIPLY", shuffled=False):
    """The layers of a product whose operands are dequantised from these types; None: float."""
    made, operands = [], []
    for place, dtype in enumerate((first, second)):
        source = Layer("CONSTANT", f"{name}/source{place}", dtype=dtype or "FLOAT")
        made.append(source)
        if dtype is not None:
            source = Layer("DEQUANTIZE", f"{name}/dequantize{place}", [source])
            made.append(source)
        if shuffled:
            source = Layer("SHUFFLE", f"{name}/shuffle{place}", [source])
            made.append(source)
        operands.append(source)
    return [*made, Layer(kind, name, operands)]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("INT8", "INT8"), "INT8"),
        (("FP8", "FP8"), "FP8"),
        (("FP4", "FP4"), "FP4"),
        ((None, "INT4"), "INT4 weight"),
        ((None, "INT8"), "INT8 weight"),
        ((None, None), "float"),
        (("INT8", None), "float"),
        (("INT8", "INT4"), "float"),
    ],
)
def test_the_precision_of_a_product_is_that_of_both_operands(types, expected):
    trt = SimpleNamespace(LayerType=KINDS)
    network = Network(*product("a.b/matmul", *types, shuffled=True))
    assert network_precisions(trt, network) == {"a.b": expected}


def test_every_call_of_a_layer_counts():
    trt = SimpleNamespace(LayerType=KINDS)
    network = Network(
        *product("a/conv", "INT8", "INT8", "CONVOLUTION"),
        *product("a/call_2/conv", None, None, "CONVOLUTION"),
        *product("b/matmul", "INT8", "INT8"),
        *product("b/call_2/matmul", "INT8", "INT8"),
        Layer("PLUGIN_V3", "c/plugin"),
        Layer("PLUGIN_V3", "e.0+e.1+e.0/call_2/plugin"),  # Merged layers.
        *product("d/product/matmul", "FP4", "FP4"),
        *product("another", None, None),
    )
    assert network_precisions(trt, network) == {
        "a": "float",
        "b": "INT8",
        "c": "plugin",
        "d": "FP4",
        "e.0": "plugin",
        "e.1": "plugin",
    }


def test_the_inspector_confirms_layers_that_have_a_kernel_of_their_own():
    rows = [
        {
            "Name": "k1",
            "Metadata": "[ONNX Layer: a/conv]",
            "Inputs": [{"Format/Datatype": "Int8 NC/32HW32"}],
        },
        {
            "Name": "k2",
            "Metadata": "[ONNX Layer: b/matmul]",
            "Inputs": [{"Format/Datatype": "Half"}],
        },
        {
            "Name": "f",
            "Metadata": "[ONNX Layer: c/conv]\x1e[ONNX Layer: d/conv]",
            "Inputs": [{"Format/Datatype": "Half"}],
        },
        {"Name": "e/matmul", "Inputs": [{"Format/Datatype": "FP8"}]},
        {"Name": "g/matmul"},
    ]
    engine = engine_precisions(rows)
    assert engine == {"a": "low-bit", "b": "float", "e": "low-bit"}
    plan = dict.fromkeys("abc", "INT8")
    network = {"a": "INT8", "b": "INT8", "c": "float"}
    assert shortfall(plan, network, engine) == [
        "b (INT8 planned, float in the engine)",
        "c (INT8 planned, float in the network)",
    ]
    assert shortfall({"z": "FP8"}, {}, {}) == ["z (FP8 planned, missing in the network)"]


def test_a_shortfall_is_an_error_that_names_the_layers():
    problems = [f"layer{index} (INT8 planned, float in the network)" for index in range(7)]
    answer = Answer(precisions={"INT8": 44, "float": 7}, shortfall=problems)
    with pytest.raises(BuildError, match=r"7 of 51 low-bit layers of unet .*layer4 .* and 2 more"):
        check_plan("tensorrt-rtx", "unet", answer)
    check_plan("tensorrt-rtx", "unet", Answer(precisions={"INT8": 51}))


def test_doctor_knows_every_extra_of_the_package_and_its_versions():
    import tomllib

    from tests.vocabulary import ROOT

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev", "docs"}
    for name, (_, packages) in EXTRAS.items():
        for package in packages:
            text = next(entry for entry in declared[name] if entry.startswith(package.name))
            assert f">={package.low}" in text
            assert package.below in text


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("10.13.0", None),
        ("11.4.0.106", None),
        ("10.12.9", "tensorrt 10.12.9 is not >=10.13,<12"),
        ("12.0", "tensorrt 12.0 is not >=10.13,<12"),
        (None, "tensorrt is not installed"),
    ],
)
def test_doctor_names_what_is_missing_or_too_old(version, problem, monkeypatch):
    from trtq.engine import extras

    monkeypatch.setattr(
        extras, "_version", lambda name: version if name == "tensorrt" else "0.53.6"
    )
    (extra,) = [extra for extra in installed_extras() if extra.name == "trt"]
    assert extra.problem == problem
    assert extra.ok == (problem is None)
    assert extra.install == "pip install -U 'trtq[trt]'"
    assert extra.packages == {"tensorrt": version, "polygraphy": "0.53.6"}
