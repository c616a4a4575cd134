"""Building TensorRT-RTX engines without a GPU; every failure raises one clear error."""

import json
import os
import re
import shutil
import signal
import sys

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

import trtq
from tests.conftest import tiny_pipeline
from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import SourceRow
from trtq.artefact.opened import open_folder
from trtq.cli import app
from trtq.engine.base import SIZES_KEY
from trtq.engine.profile import axis_ranges, profile_of
from trtq.engine.tensorrt import compile as compiling
from trtq.engine.tensorrt import worker
from trtq.engine.tensorrt.backends import BACKENDS, Backend, check_architectures, find_backend
from trtq.engine.tensorrt.compile import compile_engine
from trtq.engine.tensorrt.job import Answer, Job
from trtq.engine.tensorrt.worker import _named
from trtq.errors import (
    ArtefactError,
    BuildError,
    IntegrityError,
    LegalityError,
    MissingDependencyError,
    UsageError,
)
from trtq.exporter.build import build
from trtq.exporter.export import export
from trtq.exporter.verify import verify
from trtq.processes import Exit
from trtq.resources import cache_folder

RTX = BACKENDS["tensorrt-rtx"]
needs_rtx = pytest.mark.skipif(not RTX.installed, reason="needs tensorrt-rtx")
SMALL = """<ir_version: 10, opset_import: ["" : 21]>
g (float16[batch,8] x) => (float16[batch,4] y) { y = MatMul(x, w) }"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "cache"))


def write_graph(folder, operator="MatMul"):
    import onnx

    folder.mkdir()
    proto = onnx.parser.parse_model(SMALL.replace("MatMul", operator))
    weight = onnx.numpy_helper.from_array(np.ones((8, 4), np.float16), "w")
    proto.graph.initializer.append(weight)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def job(tmp_path, **options):
    graph = tmp_path / "graph"
    settings = {
        "module": RTX.module,
        "graph": graph / "model.onnx" if graph.exists() else write_graph(graph),
        "engine": tmp_path / "model.engine",
        "architectures": ["sm86"],
        "profiles": [{"x": ([1, 8], [2, 8], [4, 8])}],
    }
    return Job(**settings | options)


@needs_rtx
@pytest.mark.parametrize("fuse", [True, False])
def test_the_option_to_fuse_reaches_the_graph_that_is_built(
    fuse, digits_onnx, tmp_path, monkeypatch
):
    seen = []

    def built(model, runtime, **options):
        seen.append((runtime, options))
        raise BuildError("seen")

    monkeypatch.setattr("trtq.exporter.build_graph.prepare", built)
    flag = "--fuse" if fuse else "--no-fuse"
    options = ["-o", str(tmp_path / "engine"), "--backend", "tensorrt-rtx", flag]
    result = CliRunner().invoke(app, ["build", str(digits_onnx), *options])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: seen")
    assert seen == [("tensorrt-rtx", {"fuse": fuse})]


@needs_rtx
def test_the_digits_model_is_built_for_several_architectures(digits_onnx, tmp_path):
    out = tmp_path / "engine"
    result = trtq.build(digits_onnx, out, architectures=["sm86", "sm89", "SM120"])
    assert result["architectures"] == ["sm86", "sm89", "sm120"]
    (row,) = result["engines"]
    assert row["name"] == "unet"
    assert row["float"] == 0
    assert result["engine_bytes"] == (out / "unet" / "model.engine").stat().st_size > 1 << 20
    assert result["peak_rss_bytes"] > 1 << 28
    manifest = open_folder(out, "engine").manifest
    assert manifest.options.architectures == result["architectures"]
    assert manifest.source.files["unet/model.onnx"]
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert not list(out.rglob("*.onnx*"))
    expected = {
        "kind": "engine",
        "files": len(manifest.files),
        "ok": True,
        "graphs": {"unet": None},
    }
    assert verify(out).to_json() == expected
    (out / "unet" / "model.engine").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"model\.engine is not what the manifest says"):
        verify(out)


@needs_rtx
def test_an_engine_is_built_once_and_a_changed_copy_is_not_used(tmp_path):
    first = compile_engine(RTX, job(tmp_path))
    content = (tmp_path / "model.engine").read_bytes()
    again = compile_engine(RTX, job(tmp_path))
    assert (first.cached, again.cached) == (False, True)
    assert (tmp_path / "model.engine").read_bytes() == content
    assert not compile_engine(RTX, job(tmp_path, architectures=["sm89"])).cached
    wider = [{"x": ([1, 8], [2, 8], [16, 8])}]
    assert not compile_engine(RTX, job(tmp_path, profiles=wider)).cached
    assert not compile_engine(RTX, job(tmp_path), use_cache=False).cached
    for engine in cache_folder("engines").glob("*/model.engine"):
        engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    assert not compile_engine(RTX, job(tmp_path)).cached
    assert compile_engine(RTX, job(tmp_path)).cached


@needs_rtx
def test_an_operator_that_the_builder_does_not_support_is_named(tmp_path):
    write_graph(tmp_path / "graph", operator="MatMulInteger")
    with pytest.raises(BuildError, match="MatMulInteger"):
        compile_engine(RTX, job(tmp_path))
    assert not (tmp_path / "model.engine").exists()


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_building_for_the_installed_gpu_needs_a_gpu(tmp_path):
    with pytest.raises(BuildError, match=r"driver|CUDA|cannot build for current"):
        compile_engine(RTX, job(tmp_path, architectures=["current"]))


@needs_rtx
def test_an_architecture_without_the_kernels_raises_the_builders_error(tmp_path):
    """TensorRT-RTX 1.7 has no float32 products for Turing."""
    graph = write_graph(tmp_path / "graph")
    model = ir.load(graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.ones((8, 4), np.float32), name="w")
    weight.dtype = ir.DataType.FLOAT
    ir.save(model, graph)
    with pytest.raises(BuildError, match="SM75"):
        compile_engine(RTX, job(tmp_path, architectures=["sm75"]))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", r"crashed \(SIGSEGV\).*trtq verify"),
        (
            f"os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "because memory ran out: it needs about 1.0",
        ),
        ("sys.exit('no library')", "ended with code 1; last output: no library"),
    ],
    ids=["crash", "killed", "no answer"],
)
def test_a_builder_that_dies_raises_one_error(body, message, tmp_path, monkeypatch):
    (tmp_path / "dying_worker.py").write_text(f"import os, sys\n{body}\nmain = int\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(compiling, "_WORKER", "dying_worker")
    with pytest.raises(BuildError, match=message):
        compile_engine(RTX, job(tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (0xC0000005, r"crashed \(0xC0000005\).*trtq verify"),
        (-11, r"crashed \(SIGSEGV\)"),
        (-9, "because memory ran out"),
        (-35, r"crashed \(signal 35\)"),
        (3, "ended with code 3; last output: none"),
    ],
)
def test_the_death_of_a_builder_is_explained_on_every_system(code, message, tmp_path, monkeypatch):
    """Windows has no SIGKILL, and reports exceptions as exit codes."""
    monkeypatch.delattr(signal, "SIGKILL")
    assert re.search(message, compiling._explain(job(tmp_path), Exit(code), 1 << 30))


def test_a_builder_that_cannot_start_reports_the_reason(tmp_path, monkeypatch):
    """With CUDA 13 and an older driver the bindings raise TypeError, and their log has the reason."""
    import types

    class Builder:
        def __init__(self, logger):
            logger.log(0, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    module = types.ModuleType("failing_tensorrt")
    module.ILogger = type("ILogger", (), {"ERROR": 1, "WARNING": 2, "__init__": lambda self: None})
    module.Builder = Builder
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(worker, "_register_plugins", lambda trt: ("python", None))
    answer = worker.build(job(tmp_path, module=module.__name__))
    assert answer.error == (
        "the builder cannot start on this machine: CUDA initialization failure with error: 35"
    )
    old = "driver 580 or later is needed for CUDA 13, you have 550 (CUDA 12.4); update the driver"
    monkeypatch.setattr(worker, "old_driver", lambda: old)
    assert worker.build(job(tmp_path, module=module.__name__)).error.endswith(old)


def test_weights_of_plugins_are_not_streamed(digits_onnx, tmp_path, monkeypatch):
    folder = tmp_path / "onnx"
    shutil.copytree(digits_onnx, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["options"]["target"] = "plugin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("trtq.exporter.build.find_backend", lambda _: RTX)
    with pytest.raises(
        UsageError, match=r"leave out --weight-streaming, or export with --target qdq"
    ):
        build(folder, tmp_path / "engine", weight_streaming=True)
    assert not (tmp_path / "engine").exists()


def test_a_failed_build_leaves_no_output(digits_onnx, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise BuildError("no")

    monkeypatch.setattr("trtq.exporter.build.compile_engine", fail)
    monkeypatch.setattr("trtq.exporter.build.find_backend", lambda _: RTX)
    with pytest.raises(BuildError, match="no"):
        build(digits_onnx, tmp_path / "engine")
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_a_graph_that_the_backend_would_compute_wrongly_is_not_built(
    digits_onnx, tmp_path, monkeypatch
):
    from trtq.graph.runtimes.legality import Finding

    monkeypatch.setattr("trtq.exporter.build.find_backend", lambda _: RTX)
    monkeypatch.setattr(
        "trtq.exporter.build_graph.check", lambda *_: [Finding("conv_in", "a rule", "a fix")]
    )
    with pytest.raises(LegalityError, match="does not support the layer 'conv_in': a rule; a fix"):
        build(digits_onnx, tmp_path / "engine")


@pytest.mark.parametrize(
    ("backend", "wanted", "message"),
    [
        ("tensorrt-rtx", ["sm90"], "cannot build for 'sm90'; choose from sm75, sm80"),
        ("tensorrt-rtx", ["sm86", "current"], "one of several"),
        ("tensorrt", ["sm86"], "the GPU of this machine"),
    ],
)
def test_unsupported_architectures_are_refused(backend, wanted, message):
    with pytest.raises(UsageError, match=message):
        check_architectures(BACKENDS[backend], wanted)


def test_architectures_are_accepted_in_any_spelling_without_duplicates():
    assert check_architectures(RTX, ["SM_86", "sm86"]) == ["sm86"]
    assert check_architectures(RTX, []) == ["sm86", "sm89", "sm120"]
    assert check_architectures(BACKENDS["tensorrt"], []) == ["current"]


def test_the_error_about_a_missing_backend_says_how_to_install_it(monkeypatch):
    with pytest.raises(UsageError, match="choose one of tensorrt-rtx, tensorrt"):
        find_backend("trt")
    monkeypatch.setattr(Backend, "installed", False)
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'trtq\[rtx\]' or pip install 'trtq\[trt\]'"
    ):
        find_backend()
    with pytest.raises(MissingDependencyError, match="tensorrt is not installed"):
        find_backend("tensorrt")


def test_only_an_onnx_folder_is_built(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr("trtq.exporter.build.find_backend", lambda _: RTX)
    with pytest.raises(UsageError, match="trtq export RUN -o ONNX"):
        build(tmp_path / "nothing", tmp_path / "engine")
    with pytest.raises(ArtefactError, match="of kind 'run'"):
        build(digits_run, tmp_path / "engine")
    with pytest.raises(UsageError, match="where there is a GPU"):
        build(tmp_path / "nothing", tmp_path / "engine", refit=True)


class Graph:
    """The part of a model that the computation of ranges reads."""

    def __init__(self, **metadata):
        self.metadata_props = metadata


def manifest(recipe=None, **options):
    source = SourceRow(name="run", files={})
    return Manifest(kind="onnx", source=source, denoiser="unet", recipe=recipe, options=options)


@pytest.mark.parametrize(
    ("name", "recipe", "batch", "expected"),
    [
        ("unet", {"guidance": 7.5}, None, (1, 2, 16)),
        ("unet", {"guidance": 1.0}, None, (1, 1, 8)),
        ("unet", None, None, (1, 2, 16)),
        ("text_encoder", {"guidance": 7.5}, None, (1, 1, 8)),
        ("unet", {"guidance": 7.5}, (2, 3), (2, 4, 6)),
    ],
)
def test_a_denoiser_with_guidance_accepts_twice_as_many_items(
    name, recipe, batch, expected, tmp_path
):
    ranges = axis_ranges(tmp_path, name, manifest(recipe, batch=[1, 8]), Graph(), batch)
    assert ranges["batch"] == expected
    assert ranges["timesteps"] == (1, *expected[1:])
    assert ranges["tokens"] == (1, 77, 512)


def test_sizes_are_latents_for_the_decoder_and_pixels_for_the_encoder(tmp_path):
    (tmp_path / "vae_decoder").mkdir()
    config = tmp_path / "vae_decoder" / "config.json"
    config.write_text('{"block_out_channels": [1, 2, 4, 8]}')
    exported = manifest(batch=[1, 1], size="512x256:1024x768")

    def sides(name, **metadata):
        ranges = axis_ranges(tmp_path, name, exported, Graph(**metadata), None)
        return ranges["height"], ranges["width"]

    assert sides("vae_encoder") == ((512, 512, 1024), (256, 256, 768))
    assert sides("vae_decoder") == ((64, 64, 128), (32, 32, 96))
    latents = '{"low": [64, 32], "high": [128, 96], "cell": 8}'
    assert sides("unet", **{SIZES_KEY: latents}) == ((64, 64, 128), (32, 32, 96))
    config.write_text("{}")
    with pytest.raises(ArtefactError, match="how many levels"):
        sides("vae_decoder")


def test_turing_is_refused_before_a_long_build(tmp_path, monkeypatch):
    monkeypatch.setattr("trtq.exporter.build.find_backend", lambda _: RTX)
    monkeypatch.setattr("trtq.exporter.build.compile_engine", pytest.fail)
    # Few images suffice for a float model, in which no code flips.
    monkeypatch.setattr("trtq.exporter.step_check._PARITY_IMAGES", (4, 4))
    tiny = tiny_pipeline()
    diffusers.DDIMPipeline(tiny.unet, tiny.scheduler).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "float")
    with pytest.raises(UsageError, match="no products in float32, and unet has some"):
        build(tmp_path / "float", tmp_path / "engine", architectures=["sm75"])
    assert not (tmp_path / "engine").exists()


def test_free_axes_without_a_range_are_refused(tmp_path):
    model = ir.load(write_graph(tmp_path / "graph"))
    assert profile_of(model, {"batch": (1, 2, 8)}) == {"x": ([1, 8], [2, 8], [8, 8])}
    with pytest.raises(UsageError, match="free axis 'batch' of unknown range"):
        profile_of(model, {})


def test_the_layer_is_read_from_the_builders_message():
    assert _named(["x", "Error Code 10: could not find any implementation for node {a}"]) is None
    assert _named(["IBuilder: node [conv_in/conv]: unsupported"]) == "conv_in/conv"


def test_an_unwritable_cache_folder_does_not_fail_a_build(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TRTQ_CACHE", str(blocked))
    monkeypatch.setattr(
        compiling, "_run_worker", lambda job, _: job.engine.write_bytes(b"e") and Answer()
    )
    assert not compile_engine(RTX, job(tmp_path)).cached
