"""Export within a limited memory: the same graph, and refusals before any work."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import tiny_pipeline
from tests.families.pipelines import build
from tests.runs.test_format_runs import wide_pipeline
from tests.runs.test_weight_only_runs import invoke
from trtq.artefact.opened import open_artefact
from trtq.engine.ort import OrtEngine
from trtq.errors import ArtefactError, UsageError
from trtq.exporter import export as stage
from trtq.exporter import memory
from trtq.exporter.export import export
from trtq.exporter.memory import keeps_packed, needs_of
from trtq.quant.deployed import DeployedLayer
from trtq.quant.formats.weight_only import DeployedWeightOnly
from trtq.runs.folder import open_run
from trtq.runs.quantize import quantize

RECIPE = {"method": "minmax", "bits": "w4a8", "steps": 2, "calibration": {"images": 2}}
FLUX = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}
QDQ, PLUGIN = {"target": "qdq"}, {"target": "plugin"}
CASES = {
    "unet": (tiny_pipeline, {}, None, QDQ),
    "flux": (lambda: build("flux"), {"rotate": 16}, [FLUX], QDQ),
    "dit": (lambda: "digits-dit", {"bits": "w4a4"}, None, QDQ),
    "half": (tiny_pipeline, {}, None, QDQ | {"precision": "fp16"}),
    "bytes": (tiny_pipeline, {"bits": "w8a8"}, None, QDQ),
    "plugin": (tiny_pipeline, {}, None, PLUGIN),
    "recorded plugin": (lambda: build("flux"), {}, [FLUX], PLUGIN),
    "fp8": (wide_pipeline, {"format": "fp8", "bits": "w8a8"}, None, QDQ),
    "nvfp4": (wide_pipeline, {"format": "nvfp4", "bits": "w4a4"}, None, QDQ),
    "weight only": (wide_pipeline, {"bits": "w4a16"}, None, QDQ),
}
SLOW = set(CASES) - {"unet"}


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_an_export_with_packed_codes_writes_the_same_files(case, tmp_path, monkeypatch):
    model, recipe, calls, options = CASES[case]
    quantize(model(), RECIPE | recipe, tmp_path / "run", calls=calls)
    results, engines = {}, []
    engine = OrtEngine.__init__

    def opened(self, *args, packed=False, **kwargs):
        engines.append(packed)
        engine(self, *args, packed=packed, **kwargs)

    monkeypatch.setattr(OrtEngine, "__init__", opened)
    for packed in (False, True):
        engines.clear()
        monkeypatch.setattr(stage, "keeps_packed", lambda *_, packed=packed, **__: packed)
        results[packed] = export(tmp_path / "run", tmp_path / str(packed), **options)
        assert packed in engines
        assert not packed or False not in engines[:1]
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")
    assert results[True].parity_db_min == pytest.approx(results[False].parity_db_min, abs=20)


@pytest.mark.parametrize("bits", ["w3a8", "w4a8", "w8a8", "w4a16"])
def test_a_packed_denoiser_computes_the_same_bits_and_holds_no_integers(bits, tmp_path):
    quantize(tiny_pipeline(), RECIPE | {"bits": bits}, tmp_path / "run")
    run = open_run(tmp_path / "run")
    whole, packed = run.denoisers[0].build(), run.denoisers[0].build(packed=True)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [
            model(x, torch.tensor([1.0, 1.0, 501.0]), class_labels=torch.tensor([0, 1, 3])).sample
            for model in (whole, packed)
        ]
    assert torch.equal(*outputs)
    kinds = DeployedLayer | DeployedWeightOnly
    layers = [module for module in packed.modules() if isinstance(module, kinds)]
    assert len(layers) > 30
    for layer in layers:
        (codes,) = (b for name, b in layer.named_buffers() if "integers" in name)
        assert codes.untyped_storage().nbytes() == 1
        assert codes.shape == layer.integers.shape
    # Rows that count the weights see them all.
    counts = [sum(t.numel() for t in model.state_dict().values()) for model in (whole, packed)]
    assert counts[0] == counts[1]


def test_a_session_with_packed_weights_computes_the_same_integers(digits_onnx):
    path = digits_onnx / "unet" / "model.onnx"
    feeds = {
        "sample": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy(),
        "timestep": torch.tensor([1.0, 251.0, 501.0, 751.0]).numpy(),
        "class_labels": torch.tensor([0, 1, 2, 3]).numpy(),
    }
    outputs = []
    for packed in (False, True):
        session = OrtEngine(path, threads=1, low_memory=True, packed=packed)
        feeds = {name: value for name, value in feeds.items() if name in session.inputs}
        outputs.append(torch.from_numpy(next(iter(session.run(feeds).values()))))
    assert torch.allclose(*outputs, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limited") / "run"
    quantize(tiny_pipeline(), RECIPE, folder)
    return folder


def needs(in_memory=8 << 30, packed=2 << 30, disk=0):
    return memory.ExportNeeds(in_memory, packed, disk)


@pytest.mark.parametrize(
    ("limit", "available", "expected"),
    [
        (9 << 30, 0, False),
        (7 << 30, 64 << 30, True),
        (None, 11 << 30, False),
        (None, 9 << 30, True),
        (None, 0, False),
    ],
)
def test_the_limit_or_the_available_memory_decides(
    limit, available, expected, run, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(memory, "needs_of", lambda *_, **__: needs())
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    opened = open_artefact(run)
    with caplog.at_level(logging.INFO, "trtq"):
        packed = keeps_packed(opened, tmp_path / "out", limit, target="qdq", precision="fp32")
    assert packed == expected
    assert ("codes stay packed" in caplog.text) == expected


def test_memory_that_is_not_given_but_short_is_a_warning(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "needs_of", lambda *_, **__: needs())
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    opened = open_artefact(run)
    assert keeps_packed(opened, tmp_path / "out", None, target="qdq", precision="fp32")
    assert "needs about 2.15 GB of memory, more than the 859 MB" in caplog.text


def test_too_little_memory_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_write_denoiser", lambda *_, **__: pytest.fail("work began"))
    code, _, err = invoke("export", run, "-o", tmp_path / "out", "--memory", "10MB")
    assert code == 2
    assert "more than the 10 MB that may be used; allow more with --memory" in " ".join(err.split())
    file = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="allow more with --memory"):
        export(run, file, target="comfy", memory="10MB")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_write_denoiser", lambda *_, **__: pytest.fail("work began"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ArtefactError, match=r"of disk, and 1 kB are free; free some") as caught:
        export(run, tmp_path / "new" / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plugins_that_onnxruntime_cannot_compare_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MAX_REWRITTEN", 1000)
    opened = open_artefact(run)
    assert not keeps_packed(opened, tmp_path / "out", None, target="qdq", precision="fp32")
    with pytest.raises(
        UsageError, match=r"compares at most .* export integers or FP8 with --target"
    ):
        export(run, tmp_path / "out", target="plugin")


@pytest.mark.parametrize(
    ("artefact", "text", "message"),
    [
        (None, "24", "write e.g. 24GB"),
        (None, "lots", "write e.g. 24GB"),
        ("digits", "24GB", "limits the export of a run"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(artefact, text, message, run, tmp_path):
    code, _, err = invoke("export", artefact or run, "-o", tmp_path / "out", "--memory", text)
    assert code == 2
    assert message in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_the_needs_grow_with_the_weights(run):
    needed = needs_of(open_artefact(run), target="qdq", precision="fp32")
    stored = open_run(run).stored
    weights = sum(layer.weight.shape.numel() for layer in stored.layers.values())
    floats = sum(tensor.numel() for tensor in stored.floats.values())
    codes = sum(layer.weight.packed.nbytes for layer in stored.layers.values())
    assert needed.in_memory == memory._BASE + codes + 8 * floats + 4 * weights
    assert needed.packed < needed.in_memory + 16 * weights
    assert needed.disk == codes + 4 * floats
