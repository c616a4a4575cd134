"""The exported graph: its structure, and the same integers in every runtime."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import tiny_pipeline
from trtq.artefact.opened import open_folder
from trtq.engine import ort
from trtq.engine.open import open_engine
from trtq.engine.openvino import OpenVinoEngine
from trtq.engine.ort import OrtEngine
from trtq.errors import GateError, NonFiniteError, UsageError
from trtq.exporter import export as stage
from trtq.exporter import step_check as parity_stage
from trtq.exporter.export import export, parse_batch
from trtq.graph.file import save_graph
from trtq.graph.runtimes.legality import check
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.pipelines.open import open_any
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize
from trtq.snr import snr_db


def graph(folder):
    return onnx.load(folder / "unet" / "model.onnx").graph


def producers(g):
    return {name: node for node in g.node for name in node.output}


def test_every_quantised_layer_has_the_folded_form(digits_onnx):
    """The two layers of the time embedding cast their codes in the file, but not in a prepared graph."""
    path = digits_onnx / "unet" / "model.onnx"
    prepared = ir.to_proto(prepare(load_graph(path), "tensorrt-rtx")).graph
    for g, wide in ((graph(digits_onnx), 2), (prepared, 0)):
        made, constants = producers(g), {t.name: t for t in g.initializer}
        convolutions = [n for n in g.node if n.op_type == "Conv"]
        linears = [n for n in g.node if n.op_type == "MatMul" and n.name.endswith("/matmul")]
        assert (len(convolutions), len(linears)) == (25, 26)
        cast = []
        for node in convolutions + linears:
            activation, weight = (made[name] for name in node.input[:2])
            assert len(node.input) == 2, "no bias inside the integer operation"
            quantize_node = made[activation.input[0]]
            assert quantize_node.op_type == "QuantizeLinear"
            scale, zero = (numpy_helper.to_array(constants[n]) for n in quantize_node.input[1:])
            assert (scale, zero, zero.dtype) == (1.0, 0, np.int8)
            assert activation.op_type == weight.op_type
            if activation.op_type == "Cast":
                cast.append(node.name)
                continue
            assert activation.op_type == "DequantizeLinear"
            assert set(numpy_helper.to_array(constants[weight.input[1]])) == {1.0}
        assert len(cast) == wide, cast


def test_the_cpu_provider_gets_the_pairs_with_vnni(digits_onnx, vnni, monkeypatch):
    given = []
    opened = ort.open_session
    monkeypatch.setattr(ort, "open_session", lambda p, m, *r: given.append(m) or opened(p, m, *r))
    engine = OrtEngine(digits_onnx / "unet" / "model.onnx")
    assert engine.run(feeds())["out_sample"].shape == (6, 1, 8, 8)
    (model,) = given
    assert isinstance(model, bytes) is vnni, "without VNNI it is the file itself"
    proto = onnx.load_from_string(model) if vnni else onnx.load(model, load_external_data=False)
    codes = {n.output[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    users = {n.op_type for n in proto.graph.node if set(n.input) & codes}
    assert users == ({"DequantizeLinear"} if vnni else {"DequantizeLinear", "Cast"})


def test_the_step_is_looked_up_once(digits_onnx):
    counts = Counter(node.op_type for node in graph(digits_onnx).node)
    assert counts["GreaterOrEqual"] == 1
    gathers = [node for node in graph(digits_onnx).node if node.op_type == "Gather"]
    assert sum(node.input[0] == "steps/table" for node in gathers) == 1
    # Other Gathers: one for the classes, and one per rank for the scales of all channels.
    assert len(gathers) <= 5


def test_four_bit_weights_are_stored_as_int4(digits_onnx):
    kinds = Counter(t.data_type for t in graph(digits_onnx).initializer)
    assert kinds[TensorProto.INT4] == 41
    # Weights of five or more bits remain int8; the only other int8 values are zero points of pairs.
    large = [t for t in graph(digits_onnx).initializer if t.name.endswith("/weight")]
    assert Counter(t.data_type for t in large) == {TensorProto.INT4: 41, TensorProto.INT8: 10}


def test_inputs_are_those_of_diffusers(digits_onnx):
    g = graph(digits_onnx)
    assert [i.name for i in g.input] == ["sample", "timestep", "class_labels"]
    assert [o.name for o in g.output] == ["out_sample"]
    assert (digits_onnx / "model_index.json").is_file()
    assert (digits_onnx / "scheduler" / "scheduler_config.json").is_file()
    assert (digits_onnx / "unet" / "config.json").is_file()
    assert onnx.load(digits_onnx / "unet" / "model.onnx", load_external_data=False).ir_version == 10


def feeds(batch=6):
    generator = np.random.default_rng(0)
    return {
        "sample": generator.standard_normal((batch, 1, 8, 8)).astype(np.float32),
        "timestep": np.array([751, 1, 501, 251, 630, 2], np.float32)[:batch],
        "class_labels": np.arange(batch) % 10,
    }


def torch_prediction(folder, inputs):
    denoiser = open_any(folder).denoiser
    with torch.no_grad():
        return denoiser(**{k: torch.from_numpy(v) for k, v in inputs.items()}, return_dict=False)[0]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_plain_onnxruntime_sessions_agree_with_torch(digits_run, digits_onnx, level):
    """The default optimisations are tested too; their uint8 products saturate on older processors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    path = str(digits_onnx / "unet" / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = feeds()
    expected = torch_prediction(digits_run, inputs)
    # A single flipped code would exceed this tolerance; no code may flip for these inputs.
    assert snr_db(expected, torch.from_numpy(session.run(None, inputs)[0])) > 60


def test_each_item_can_have_its_own_step_and_one_timestep_serves_all(digits_onnx, computed_vnni):
    engine = OrtEngine(digits_onnx / "unet" / "model.onnx")
    inputs = feeds()
    together = engine.run(inputs)["out_sample"]
    for item in range(6):
        alone = engine.run({k: v[item : item + 1] for k, v in inputs.items()})["out_sample"]
        assert snr_db(torch.from_numpy(together[item]), torch.from_numpy(alone[0])) > 60
    single = engine.run(inputs | {"timestep": np.array([501], np.float32)})
    many = engine.run(inputs | {"timestep": np.full(6, 501, np.float32)})
    np.testing.assert_array_equal(single["out_sample"], many["out_sample"])


def test_openvino_agrees_with_torch(digits_run, digits_onnx, computed_vnni):
    inputs = feeds()
    out = open_engine(digits_onnx / "unet" / "model.onnx", "openvino", 1).run(inputs)["out_sample"]
    expected = torch_prediction(digits_run, inputs)
    each = [snr_db(a, b) for a, b in zip(expected, torch.from_numpy(out), strict=True)]
    # OpenVINO's group norms are float32, so a code may flip in some items; wrong arithmetic (e.g.
    # saturating products) would change all items.
    assert sorted(each)[3] > 60, each


def test_openvino_keeps_a_session_for_each_of_the_latest_shapes(digits_onnx):
    engine = OpenVinoEngine(digits_onnx / "unet" / "model.onnx", threads=1, max_shapes=2)
    inputs = feeds()
    assert engine.inputs["sample"].shape == ("batch", 1, 8, 8)
    whole = engine.run(inputs)["out_sample"]
    for count in (1, 2, 6, 1):
        part = {name: value[:count] for name, value in inputs.items()}
        out = engine.run(part)["out_sample"]
        # Sums may be split differently for another batch size, so equality excludes the last bits.
        assert snr_db(torch.from_numpy(whole[:count]), torch.from_numpy(out)) > 40
    assert len(engine._sessions) == 2
    assert {dict(shapes)["sample"][0] for shapes in engine._sessions} == {6, 1}


@pytest.mark.parametrize(
    ("bits", "precision"), [("w4a4", "fp16"), ("w8a8", "fp32"), ("w3a8", "fp32")]
)
def test_all_bits_and_precisions_are_exported(bits, precision, tmp_path, monkeypatch):
    # With random weights, parity in half precision at 4 bits is a matter of chance; the test is about
    # the structure of the graph.
    monkeypatch.setitem(stage.PARITY_DB, "fp16", 0.0)
    settings = {"method": "minmax", "steps": 3, "bits": bits, "calibration": {"images": 8}}
    quantize(tiny_pipeline(), settings, tmp_path / "run")
    result = export(tmp_path / "run", tmp_path / "onnx", precision=precision)
    assert len(result["parity_db"]) == 4
    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    g = graph(tmp_path / "onnx")
    types = {i.name: i.type.tensor_type.elem_type for i in g.input}
    assert types["sample"] == kind
    assert types["timestep"] == TensorProto.FLOAT
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["metrics"]["parity_db_min"] == result["parity_db_min"]


def test_static_tables_are_constants(tmp_path):
    settings = {"method": "minmax", "steps": 3, "tables": "static", "calibration": {"images": 8}}
    quantize(tiny_pipeline(), settings, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "onnx")
    assert not [n for n in graph(tmp_path / "onnx").node if n.name.startswith("steps/")]


def test_a_checkpoint_is_exported_as_the_float_baseline(tmp_path):
    result = export("digits", tmp_path / "onnx")
    assert result["parity_db_min"] > 100


def test_a_failed_parity_check_leaves_no_output(digits_run, tmp_path, monkeypatch):
    from trtq.exporter.parity import StepParity

    monkeypatch.setattr(
        "trtq.exporter.step_check.step_parity", lambda *_: [StepParity(39, 39, 0.0, 200)]
    )
    with pytest.raises(GateError, match=r"to only 39\.0 dB; 40 dB are required"):
        export(digits_run, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_graph_is_named(tmp_path):
    import onnx_ir as ir

    node = helper.make_node("Add", ["x", "bad"], ["y"])
    value = helper.make_tensor_value_info
    g = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.array([np.nan], np.float32), "bad")],
    )
    with pytest.raises(NonFiniteError, match="'bad'"):
        save_graph(ir.from_proto(helper.make_model(g)), tmp_path / "graph")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["8:1", "0:4", "a", "1:b", ""])
def test_malformed_batch_ranges_are_refused(text):
    with pytest.raises(UsageError, match="MIN:MAX"):
        parse_batch(text)


@pytest.mark.parametrize(
    ("db", "floor", "holds"),
    [(41, 200, True), (39, 200, False), (33, 30, True), (33, 38, True), (33, 45, False)],
)
def test_parity_holds_above_the_requirement_or_near_the_floor(db, floor, holds):
    from trtq.exporter.parity import StepParity

    assert StepParity(db, db, 0.0, floor).holds(40.0) is holds
    assert not StepParity(float("nan"), 0.0, 0.0, floor).holds(40.0)


def test_measuring_the_floor_does_not_change_the_model(digits_run):
    import torch

    from trtq.diffusion.sampling import Conditions, seeded_noise
    from trtq.diffusion.schedule import NoiseSchedule
    from trtq.exporter.parity import step_parity
    from trtq.pipelines.open import open_any

    source = open_any(digits_run)
    schedule = NoiseSchedule.of(source.pipeline.scheduler, 4)
    noise = seeded_noise(source.sample_shape, 0, 0, 8)
    conditions = Conditions({"class_labels": torch.arange(8)})
    rows = step_parity(source.denoiser, source.denoiser, schedule, noise, conditions)
    assert [row.db for row in rows] == [200.0] * 5
    assert [row.floor_db for row in rows] == [200.0] * 5

    def far(**inputs):
        return (source.denoiser(**inputs)[0] + 0.1,)

    rows = step_parity(source.denoiser, far, schedule, noise, conditions)
    assert all(row.db < 40 for row in rows)
    assert 20 < min(row.floor_db for row in rows) < 200
    assert not any(module._forward_pre_hooks for module in source.denoiser.modules())


@pytest.mark.parametrize(("wrong_steps", "aside"), [(1, True), (3, False)])
def test_flipped_codes_are_set_aside_only_if_they_are_rare(tiny, wrong_steps, aside):
    """A tenth of the images is wrong at one of four steps (2.5 % of all) or at three (7.5 %)."""
    from trtq.diffusion.sampling import seeded_noise
    from trtq.exporter.parity import step_parity

    schedule = tiny.schedule(4)
    generator = torch.Generator().manual_seed(0)
    conditions = tiny.draw_conditions(20, generator)
    noise = seeded_noise(tiny.sample_shape, 0, 0, 20)
    bad = set(schedule.timesteps[:wrong_steps].tolist())

    def exported(**inputs):
        (prediction,) = tiny.denoiser(**inputs)
        timestep = torch.as_tensor(inputs["timestep"])
        if timestep.numel() == 1 and timestep.item() in bad:
            prediction[:2] += 0.1
        return (prediction,)

    rows = step_parity(tiny.denoiser, exported, schedule, noise, conditions)
    assert (min(row.db for row in rows) > 60) is aside
    assert min(row.pooled_db for row in rows) < 40


def test_queries_keys_and_values_are_quantised_once(digits_onnx):
    rows = open_folder(digits_onnx).manifest.layers
    sharing = [row for row in rows if row.input_of is not None]
    assert {row.name.rpartition(".")[2] for row in sharing} == {"to_k", "to_v"}
    nodes = onnx.load(digits_onnx / "unet" / "model.onnx", load_external_data=False).graph.node
    quantized = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(quantized) == len(rows) - len(sharing)


@pytest.mark.parametrize(
    ("flipped", "moved", "aside"),
    [(2, None, True), (4, None, False), (4, 3, True), (5, 3, False), (8, 8, True), (9, 20, False)],
)
def test_flips_are_set_aside_in_proportion_to_those_of_the_reference(flipped, moved, aside):
    from trtq.exporter.parity import compare

    reference = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def wrong(count):
        other = reference.clone()
        other[:count] += 0.1
        return other

    row = compare(reference, wrong(flipped), None if moved is None else wrong(moved))
    assert (row.db == 200) is aside
    assert row.pooled_db < 40
    assert row.ties == pytest.approx(flipped / 20 if aside else 0)
    assert row.floor_ties == pytest.approx((moved or 0) / 20)


@pytest.mark.parametrize("vnni", [False], indirect=True)
def test_without_vnni_openvino_gets_seven_bit_weights_as_integers(tmp_path, vnni):
    """In a trained model the first, last, time, skip and downsampling layers keep 8 bits, in float."""
    run, onnx_folder = tmp_path / "run", tmp_path / "onnx"
    quantize("digits", {"method": "minmax", "bits": "w7a8", "steps": 2}, run)
    export(run, onnx_folder)
    rows = {row.name: row for row in open_folder(run).manifest.layers}
    path = onnx_folder / "unet" / "model.onnx"
    model = prepare(load_graph(path), "openvino")
    findings = check(model, "openvino")
    assert {rows[finding.layer].weight_bits for finding in findings} == {8}
    kernels = [n for n in model.graph if n.op_type == "Conv" and n.name.endswith("/as_conv/conv")]
    assert len(kernels) == sum(r.kind == "linear" and r.weight_bits == 7 for r in rows.values()) - 8
    assert len(OpenVinoEngine(path).inputs) == 3


def test_a_wrong_step_lookup_is_detected_in_a_model_of_any_size(
    digits_run, digits_onnx, tmp_path, monkeypatch
):
    run = open_run(digits_run)
    monkeypatch.setattr(parity_stage, "_PARITY_WEIGHTS", 1 << 20)
    path = digits_onnx / "unet" / "model.onnx"
    (row,) = parity_stage.step_parities(run.source(), path, run.manifest)
    assert row.holds(40)
    assert len(parity_stage.step_parities(run.source(), path, run.manifest, thorough=True)) == 5
    model = onnx.load(path)
    (compared,) = [node for node in model.graph.node if node.name == "steps/passed"]
    compared.op_type = "Greater"
    wrong = tmp_path / "model.onnx"
    onnx.save(model, wrong)
    with pytest.raises(GateError, match=r"uses step \d of its tables, torch step \d"):
        parity_stage.step_parities(run.source(), wrong, run.manifest)


def test_a_graph_holds_no_path_of_the_machine_that_exported_it(digits_onnx):
    text = (digits_onnx / "unet" / "model.onnx").read_bytes()
    for path in (Path(__file__).parents[2], Path(torch.__file__).parent, digits_onnx.parent):
        assert str(path).encode() not in text
    assert b"stack_trace" not in text
