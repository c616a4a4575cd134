"""Attention processors that pipelines or users set are recorded, restored and checked."""

import copy
from typing import ClassVar

import pytest
import torch

import trtq
from tests.calls.zoo import ZOO
from trtq.artefact.manifest_rows import GraphRow
from trtq.calls.form import flatten_call
from trtq.calls.processors import (
    attention_processors,
    described_processors,
    kept_processors,
    with_processors,
)
from trtq.calls.recorder import TIMESTEP_NAMES, call_until, observed
from trtq.checkpoint.ip_adapter import adapter_names, adapter_scales
from trtq.diffusion.folder import skeleton
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.errors import UsageError

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
MID_PROCESSOR = f"{MID}.processor"


class Halved:
    """A processor that computes something else than attention."""

    def __init__(self, factor=0.5):
        self.factor = factor

    def __call__(self, attn, hidden_states, *_, **__):
        return self.factor * hidden_states


class Sets:
    """A pipeline that sets a processor during its call, and restores it at the end of the call."""

    def __init__(self, unet, processor):
        self.unet, self.processor = unet, processor

    def __call__(self):
        before = self.unet.attn_processors
        self.unet.set_attn_processor(before | {MID_PROCESSOR: self.processor})
        for timestep in (9, 5):
            predict(self.unet, timestep)
        self.unet.set_attn_processor(before)


def predict(unet, timestep=5):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(sample, timestep, text, return_dict=False)[0]


@pytest.fixture(scope="module")
def unet():
    return ZOO["sd_img2img"].pipeline().unet


@pytest.fixture(scope="module")
def adapted():
    return ZOO["sd_ip_adapter"].pipeline().unet


def test_a_block_with_processors_computes_as_the_pipeline_and_leaves_the_model(unet):
    before, plain = attention_processors(unet), predict(unet)
    processor = Halved()
    with with_processors(unet, {MID_PROCESSOR: processor}):
        assert unet.get_submodule(MID).processor is processor
        assert not torch.equal(predict(unet), plain)
    assert attention_processors(unet) == before
    assert torch.equal(predict(unet), plain)


def test_only_the_settings_of_processors_with_weights_are_taken_over(adapted):
    other = copy.deepcopy(adapted)
    for processor in other.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.25]
    before = attention_processors(adapted)
    texts = described_processors(before)
    with with_processors(adapted, attention_processors(other)):
        assert described_processors(attention_processors(adapted)) == described_processors(
            attention_processors(other)
        )
        # The weights are those of the model: they may be low-bit there.
        assert all(adapted.attn_processors[name] is before[name] for name in before if "2" in name)
    assert described_processors(attention_processors(adapted)) == texts


def test_recorded_calls_hold_the_processors_that_the_pipeline_sets(unet):
    processor, seen = Halved(), []
    with observed({"unet": unet}, lambda call: seen.append(call.copied())):
        predict(unet)
        Sets(unet, processor)()
    assert [dict(call.processors) for call in seen] == [
        {},
        {MID_PROCESSOR: processor},
        {MID_PROCESSOR: processor},
    ]


def test_a_call_that_ends_early_leaves_the_processors_as_before(unet):
    before = attention_processors(unet)
    pipeline = Sets(unet, Halved())
    call_until(pipeline, {"unet": unet}, 1, pipeline)
    assert attention_processors(unet) == before
    with kept_processors([unet]):
        unet.set_attn_processor(Halved())
    assert attention_processors(unet) == before


class Engine:
    """Returns ones."""

    provider = device = "cpu"
    inputs: ClassVar[dict] = {}

    def run_tensors(self, feeds):
        return {"output_0": torch.ones(1, 4, 8, 8)}


def recorded(unet, processors=()):
    """A denoiser with one graph of `predict`, traced with processors."""
    call = (torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 4, 32))
    form, _ = flatten_call(unet, call, {}, frozenset(TIMESTEP_NAMES))
    row = GraphRow(
        folder="unet",
        template=form.template,
        output={"tuple": [{"tensor": "output_0"}]},
        processors=described_processors(dict(processors)),
    )
    return RecordedDenoiser("unet", copy.deepcopy(unet), [CallGraph(Engine(), row)])


def test_a_graph_refuses_processors_with_which_it_was_not_traced(unet):
    denoiser = recorded(unet)
    assert torch.equal(predict(denoiser), torch.ones(1, 4, 8, 8))
    denoiser.set_attn_processor(Halved())
    with pytest.raises(
        UsageError, match=r"traced with the attention processor AttnProcessor2_0\(\)"
    ):
        predict(denoiser)


def test_a_graph_takes_the_processors_that_its_pipeline_sets_and_no_others(unet):
    denoiser = recorded(unet, {MID_PROCESSOR: Halved()})
    pipeline = Sets(denoiser, Halved())
    pipeline()
    with pytest.raises(
        UsageError, match=r"Halved\(factor=0.5\) at mid_block.*uses AttnProcessor2_0"
    ):
        predict(denoiser)
    with pytest.raises(UsageError, match=r"pipeline uses Halved\(factor=0.25\)"):
        Sets(denoiser, Halved(0.25))()


def test_another_strength_of_an_ip_adapter_is_refused_by_a_graph(adapted):
    denoiser = recorded(adapted)
    predict(denoiser)
    for processor in denoiser.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.5]
    with pytest.raises(UsageError, match=r"scale=\[1.0\].*pipeline uses .*scale=\[0.5\]"):
        predict(denoiser)


def test_pipelines_see_the_attention_of_a_recorded_denoiser_but_not_its_parameters(unet):
    denoiser = recorded(unet)
    names = {name for name, _ in denoiser.named_modules()}
    assert MID in names
    assert [name for name, _ in denoiser.named_parameters()] == ["place"]
    assert list(denoiser.buffers()) == []


def test_strengths_that_are_no_numbers_are_refused(adapted):
    other = copy.deepcopy(adapted)
    scales = adapter_scales(other, "the unet")
    assert set(map(tuple, scales.values())) == {(1.0,)}
    for processor in other.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [[0.5, 0.2]]
    with pytest.raises(UsageError, match=r"strengths \[\[0.5, 0.2\]\] at .*attn2.*one number"):
        adapter_scales(other, "the unet")


def set_strength(unet, strength):
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [strength]


def test_a_skeleton_has_the_strengths_of_the_manifest(tmp_path):
    pipeline = ZOO["sd_ip_adapter"].pipeline()
    set_strength(pipeline.unet, 0.5)
    tensors = pipeline.unet.state_dict()
    shapes = {name: tuple(tensors[name].shape) for name in adapter_names(tensors)}
    scales = adapter_scales(pipeline.unet, "the unet")
    pipeline.save_pretrained(tmp_path)
    assert adapter_scales(skeleton(tmp_path, "unet", shapes), "") != scales
    assert adapter_scales(skeleton(tmp_path, "unet", shapes, scales), "") == scales


@pytest.mark.slow
def test_a_run_and_its_graph_keep_the_strength_with_which_they_were_calibrated(tmp_path):
    case = ZOO["sd_ip_adapter"]
    pipeline = case.pipeline()
    set_strength(pipeline.unet, 0.25)
    recipe = {"method": "minmax", "bits": "w8a8", "calibration": {"images": 1}}
    trtq.quantize(pipeline, recipe, tmp_path / "run", calls=[case.call()])
    run = trtq.load(tmp_path / "run")
    scales = adapter_scales(run.unet, "the unet")
    assert set(map(tuple, scales.values())) == {(0.25,)}
    trtq.export(tmp_path / "run", tmp_path / "onnx")
    loaded = trtq.load(tmp_path / "onnx")
    generator = torch.Generator().manual_seed
    expected = run(**case.call(), generator=generator(0)).images
    torch.testing.assert_close(loaded(**case.call(), generator=generator(0)).images, expected)
    set_strength(loaded.unet, 1.0)
    with pytest.raises(UsageError, match=r"scale=\[0.25\].*uses .*scale=\[1.0\]"):
        loaded(**case.call(), generator=generator(0))
