"""Stage 5 without a GPU: onnxruntime's CPU provider in place of the GPU's, and denoisers with faults."""

from __future__ import annotations

import pytest
import torch

from trtq.artefact.manifest import MANIFEST_NAME
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.pipelines.open import open_any
from trtq.selftest import engines
from trtq.selftest.agreement import compare_denoiser
from trtq.selftest.engines import Artefacts
from trtq.selftest.trials import Options, SkippedError

TIMESTEPS = [1.0, 251.0, 501.0, 751.0]


@pytest.fixture(scope="module")
def reference(digits_onnx):
    return open_any(digits_onnx, "cpu")


def test_the_same_graph_agrees_at_each_step_batch_and_call(reference):
    outcome = compare_denoiser(reference, reference.denoiser, TIMESTEPS)
    assert outcome.fault is None
    assert outcome.detail["min_db"] == 200
    assert outcome.detail["calls"] == 4 + 3 + 4


class Repeating:
    """Repeats its first output of each shape, as a captured graph on other addresses does."""

    def __init__(self, denoiser):
        self.denoiser, self.first = denoiser, {}

    def __call__(self, sample, *arguments, **options):
        if sample.shape not in self.first:
            self.first[sample.shape] = self.denoiser(sample, *arguments, **options)
        return self.first[sample.shape]


class Changed:
    """Changes the output of a denoiser in the n-th call."""

    def __init__(self, denoiser, call, change):
        self.denoiser, self.call, self.change, self.calls = denoiser, call, change, 0

    def __call__(self, *arguments, **options):
        (output,) = self.denoiser(*arguments, **options)
        self.calls += 1
        return (self.change(output) if self.calls == self.call else output,)


def test_a_repeated_output_is_found_and_named(reference):
    outcome = compare_denoiser(reference, Repeating(reference.denoiser), TIMESTEPS)
    assert outcome.fault.startswith("call 2, batch 2, timestep 251: the prediction agrees with ")
    assert outcome.fault.endswith("; it repeats the output of the call before")


@pytest.mark.parametrize("call", [1, 6, 11])
@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda x: x * float("nan"), lambda x: x.flip(0) + 1, lambda x: x * 1.2],
    ids=["zeros", "nan", "flipped", "scaled"],
)
def test_one_wrong_call_is_found(reference, call, change):
    outcome = compare_denoiser(reference, Changed(reference.denoiser, call, change), TIMESTEPS)
    assert outcome.fault.startswith(f"call {call}, ")
    assert outcome.detail["calls"] == call


def test_what_is_not_installed_is_one_skipped_trial_each(monkeypatch, tmp_path):
    monkeypatch.setattr(type(BACKENDS["tensorrt"]), "installed", False)
    trials = {t.name: t for t in engines.trials(Options(scratch=str(tmp_path)))}
    assert list(trials) == [
        *("export", "engines of tensorrt-rtx", "engines of tensorrt"),
        *("onnxruntime cuda", "onnxruntime tensorrt-rtx", "onnxruntime tensorrt"),
    ]
    for name in list(trials)[1:]:
        with pytest.raises(SkippedError, match="pip install"):
            trials[name].call()


@pytest.fixture
def artefacts(digits_onnx, tmp_path, monkeypatch):
    """Folders of the stage, in which the graph of pairs is that of the other tests."""
    (tmp_path / "onnx-qdq").symlink_to(digits_onnx)
    made = Artefacts(tmp_path, TIMESTEPS)
    monkeypatch.setattr(engines, "make_artefacts", lambda folder: made)
    return made


def test_a_provider_is_compared_and_the_switch_of_graphs_is_restored(artefacts, monkeypatch):
    monkeypatch.delenv("TRTQ_CUDA_GRAPHS", raising=False)
    outcome = engines._provider(artefacts.folder, "cpu", graphs=False)
    assert (outcome.fault, outcome.detail["min_db"]) == (None, 200)
    assert "TRTQ_CUDA_GRAPHS" not in engines.os.environ
    with pytest.raises(SkippedError, match="without CUDA"):
        engines._provider(artefacts.folder, "cpu", graphs=True)


@pytest.mark.slow
def test_the_second_process_compares_too(artefacts, monkeypatch):
    """The second process opens an ONNX folder in place of an engine."""
    backend = BACKENDS["tensorrt-rtx"]
    artefacts.engine("qdq", backend.name).symlink_to(artefacts.onnx("qdq"))
    outcome = engines._second(artefacts.folder, backend, "qdq")
    assert (outcome.fault, outcome.detail["min_db"]) == (None, 200)
    assert outcome.detail["open_seconds"] > 0


def test_without_an_engine_its_trials_are_skipped(artefacts):
    with pytest.raises(SkippedError, match="there is no engine: building with tensorrt failed"):
        engines._run(artefacts.folder, BACKENDS["tensorrt"], "qdq")


@pytest.mark.slow
def test_the_artefacts_of_the_stage_are_made_once(tmp_path):
    made = engines.make_artefacts(tmp_path)
    assert [made.onnx(target).is_dir() for target in engines.TARGETS] == [True, True]
    assert len(made.timesteps) == engines.RECIPE["steps"]
    before = (made.onnx("qdq") / MANIFEST_NAME).stat().st_mtime_ns
    engines.make_artefacts.cache_clear()
    assert engines.make_artefacts(tmp_path) == made
    assert (made.onnx("qdq") / MANIFEST_NAME).stat().st_mtime_ns == before
    outcome = engines._provider(tmp_path, "openvino", graphs=False)
    assert outcome.fault is None
