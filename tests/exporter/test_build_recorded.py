"""Engines of a pipeline that was recorded inside its call, built without a GPU."""

from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch

import trtq
from tests.calls.inpainting import arguments
from trtq.artefact.manifest_rows import AxisRow, GraphRow
from trtq.artefact.opened import open_folder
from trtq.engine.call_profile import call_profile, within_profile
from trtq.engine.ort import OrtEngine
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import UsageError
from trtq.exporter.build import build
from trtq.graph.file import MODEL_FILE
from trtq.pipelines import open as opening

IMAGES = (1, 3)
needs_rtx = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed, reason="needs tensorrt-rtx")


@pytest.fixture(scope="module")
def recorded_onnx(inpainting_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "onnx"
    trtq.export(inpainting_run, out, batch=IMAGES)
    return out


@pytest.fixture(scope="module")
def engines(recorded_onnx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTQ_CACHE", str(folder / "cache"))
        result = build(recorded_onnx, folder / "engine", architectures=["sm86"])
    assert [row.name for row in result.engines] == ["unet"]
    return folder / "engine"


@needs_rtx
def test_the_manifest_has_the_ranges_and_the_metadata_of_every_graph(recorded_onnx, engines):
    options = open_folder(engines, "engine").manifest.options
    # Guidance passes two rows per image.
    rows = [2 * count for count in IMAGES]
    shapes = [shape[0] for shape in options.profiles["unet"]["sample"]]
    assert shapes == [rows[0], rows[0], rows[1]]
    graph = OrtEngine(recorded_onnx / "unet" / MODEL_FILE)
    assert options.call_metadata == {"unet": dict(graph.metadata)}
    assert trtq.verify(engines).ok


def test_a_recorded_denoiser_reads_and_writes_the_tensors_of_the_pipeline(recorded_onnx):
    pipeline = trtq.load(recorded_onnx)
    (engine,) = pipeline.unet.engines
    bound, run, forward = [], engine.run_tensors, pipeline.unet.forward

    def run_tensors(feeds):
        outputs = run(feeds)
        bound.append((feeds["sample"].data_ptr(), next(iter(outputs.values())).data_ptr()))
        return outputs

    passed = []

    def watched(sample, *args, **kwargs):
        result = forward(sample, *args, **kwargs)
        passed.append((sample, result[0]))  # Kept, so that no address comes twice.
        return result

    engine.run_tensors, pipeline.unet.forward = run_tensors, watched
    pipeline(**arguments(), generator=torch.Generator().manual_seed(0), output_type="pt")
    assert bound == [(x.data_ptr(), y.data_ptr()) for x, y in passed]
    assert len(bound) > 1


class _Engine(OrtEngine):
    """Stand-in for an engine: its graph, under the name of the backend."""

    def __init__(self, path, metadata):
        super().__init__(path)
        self.provider, self.metadata = "tensorrt-rtx", metadata


@needs_rtx
def test_the_engines_run_inside_the_pipeline_within_their_ranges(
    recorded_onnx, engines, monkeypatch
):
    def open_engine(path, provider, threads=None, metadata=None):
        assert (path.parent, provider) == (engines / "unet", "tensorrt-rtx")
        return _Engine(recorded_onnx / "unet" / MODEL_FILE, metadata)

    def called(pipeline, **changes):
        generator = torch.Generator().manual_seed(0)
        call = arguments() | changes
        return pipeline(**call, generator=generator, output_type="pt").images

    expected = called(trtq.load(recorded_onnx), num_images_per_prompt=IMAGES[1])
    monkeypatch.setattr(opening, "open_engine", open_engine)
    loaded = trtq.load(engines)
    assert torch.equal(called(loaded, num_images_per_prompt=IMAGES[1]), expected)
    message = r"has size 8; the engine supports 2 \.\. 6 \(batch\); to widen it, .*--batch-range"
    with pytest.raises(UsageError, match=message):
        called(loaded, num_images_per_prompt=IMAGES[1] + 1)


def graph_of(**shapes):
    inputs = [SimpleNamespace(name=name, shape=ir.Shape(shape)) for name, shape in shapes.items()]
    return SimpleNamespace(graph=SimpleNamespace(inputs=inputs))


def graph_row(**free):
    return GraphRow(folder="unet", template={}, output={}, free=free)


def test_ranges_follow_from_what_varies():
    model = graph_of(x=["n", 4, "h"], text=["n", "t"], length=[1])
    batch = AxisRow(axis=0, varies="batch", low=1, seen=4)
    size = AxisRow(axis=2, varies="size", low=8, high=32, seen=8)
    tokens = AxisRow(axis=1, varies="prompt", low=1, seen=77)
    row = graph_row(x=[batch, size], text=[batch, tokens])
    profile = call_profile(row, model, (1, 8), images=2)
    assert profile == {
        "x": ([2, 4, 8], [2, 4, 8], [16, 4, 32]),
        "text": ([2, 1], [2, 77], [16, 512]),
        "length": ([1], [1], [1]),
    }
    limited = within_profile(row, profile)
    assert [(axis.low, axis.high) for axis in limited.free["text"]] == [(2, 16), (1, 512)]
    # A recorded prompt may be longer than the usual maximum.
    longer = graph_row(text=[batch, tokens.model_copy(update={"seen": 700})])
    assert call_profile(longer, graph_of(text=["n", "t"]), (1, 1), 2)["text"][2] == [2, 700]


def test_an_export_of_an_earlier_version_says_what_to_do():
    row = graph_row(x=[AxisRow(axis=0, varies="batch", low=1)])
    with pytest.raises(
        UsageError, match="no size of axis 0 of the input 'x'; export the model again"
    ):
        call_profile(row, graph_of(x=["n", 4]), (1, 8), 1)


def test_ranges_of_an_edited_manifest_do_not_apply():
    row = graph_row(x=[AxisRow(axis=3, varies="batch", low=1, seen=1)])
    assert within_profile(row, {"x": ([1], [1], [8])}) == row
    assert within_profile(row, {}) == row
