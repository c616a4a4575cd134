"""Benchmarks of pipelines that are used through their own call."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import trtq
from tests.calls.inpainting import arguments
from trtq.bench.artefacts import BenchRow, baseline, parse_rows
from trtq.bench.called import MeasuredCall
from trtq.calls.user_call import UserCall
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.errors import UsageError
from trtq.runs.weights import FILE_NAME

STEPS = arguments()["num_inference_steps"]


def test_all_rows_make_the_recorded_call(inpainting_run, inpainting_model):
    (row,) = rows = parse_rows([str(inpainting_run)])
    assert row.call_of == str(inpainting_run)
    assert row.denoiser_bytes == (inpainting_run / FILE_NAME).stat().st_size
    notes = []
    (added,) = baseline(rows, notes)
    assert (added.path, added.call_of) == (str(inpainting_model), str(inpainting_run))
    both = parse_rows([str(inpainting_model), str(inpainting_run)])
    assert [row.call_of for row in both] == [str(inpainting_run)] * 2


def test_a_float_pipeline_alone_gets_a_default_call(inpainting_model):
    (row,) = parse_rows([str(inpainting_model)])
    assert row.call_of == ""


def test_a_row_that_was_not_recorded_is_refused(inpainting_run, digits_run):
    with pytest.raises(UsageError, match="bench them separately"):
        parse_rows([str(inpainting_run), str(digits_run)])


def test_rows_that_trtq_calls_itself_have_no_call(digits_run):
    (row,) = parse_rows([str(digits_run)])
    assert isinstance(row, BenchRow)
    assert row.call_of is None


@pytest.fixture(scope="module")
def opened(inpainting_run):
    row = MeasuredCall(str(inpainting_run))
    return row, row.open(str(inpainting_run), "torch", 1, None)


def test_the_call_gives_steps_guidance_and_the_parts_to_time(opened):
    _, answer = opened
    assert (answer["steps"], answer["guidance"], answer["prompts"]) == (STEPS, 7.5, None)
    assert (answer["parts"], answer["shape"]) == (["denoiser"], [])
    assert (answer["model_class"], answer["device"]) == ("UNet2DConditionModel", "cpu")


def test_the_middle_denoiser_call_is_timed(opened):
    row, _ = opened
    prepared = row.prepare("denoiser", 2, STEPS, 7.5)
    assert prepared["calls"] >= 1
    seen = []
    denoiser = row.source.pipeline.unet
    handle = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(args[0]), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    assert len(row.time()["seconds"]) == prepared["calls"]
    handle.remove()
    # Two images with guidance are four rows.
    assert set(seen) == {(4, False)}


def test_the_images_are_those_of_the_pipeline(opened, inpainting_run, tmp_path):
    row, _ = opened
    cost = row.draw(1, STEPS, 5, 7.5, None, 0, str(tmp_path / "images.npy"))
    assert cost["seconds"] > 0
    drawn = np.load(tmp_path / "images.npy")
    assert drawn.shape == (1, 3, 16, 16)
    assert -1 <= drawn.min() < drawn.max() <= 1
    trtq.generate(inpainting_run, tmp_path / "out", images=1, seed=5)
    image = Image.open(tmp_path / "out" / "image-0000.png").convert("RGB")
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.abs((drawn[0] + 1) * 127.5 - pixels).max() < 0.51


def test_the_warm_up_does_not_draw_again(opened):
    row, _ = opened
    assert row.draw(1, STEPS, 5, 7.5, None, None, None) == {"seconds": 0.0, "joules": None}
    assert row.operations(1, STEPS, 7.5) == {"operations": None}


def test_a_number_of_images_that_the_call_cannot_make_is_refused(opened, monkeypatch):
    row, _ = opened
    monkeypatch.setattr(row, "_user_call", UserCall(arguments() | {"prompt": ["a", "b"]}))
    with pytest.raises(UsageError, match="cannot make 3 images at once; use --batch-sizes 2"):
        row.prepare("denoiser", 3, STEPS, 7.5)


def test_graphs_of_a_gpu_count_as_on_the_gpu():
    from trtq.bench.measured import _on_gpu

    denoiser = RecordedDenoiser.__new__(RecordedDenoiser)
    nn.Module.__init__(denoiser)
    for provider, expected in (("cpu", False), ("tensorrt-rtx", True)):
        engine = type("Engine", (), {"provider": provider})()
        graph = CallGraph(engine, None)
        denoiser.graphs = {"form": [graph]}
        assert _on_gpu(denoiser) is expected
