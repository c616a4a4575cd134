"""Small models that several tests share."""

import os

import pytest
import torch

from trtq.diffusion.pipeline import load_source
from trtq.exporter.export import export
from trtq.processor import VARIABLE, has_vnni
from trtq.runs.quantize import quantize

# Threads of one operator wait for each other by turning in circles. Where something else runs, too,
# tests of tiny models have so taken many times as long as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_COMPUTED_RIGHTLY = [True, False] if has_vnni() else [False]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is left in the user's cache, and nothing in it is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(VARIABLE, raising=False)
        yield


@pytest.fixture(params=[True, False], ids=["vnni", "no vnni"])
def vnni(request, monkeypatch):
    """The test runs as on both kinds of processors; whether this one is taken to have VNNI.

    For what is written, imported or refused. What the other kind of processor computes cannot be seen.
    """
    monkeypatch.setenv(VARIABLE, "+vnni" if request.param else "-vnni")
    return request.param


@pytest.fixture(params=_COMPUTED_RIGHTLY, ids=lambda vnni: "vnni" if vnni else "no vnni")
def computed_vnni(request, monkeypatch):
    """As `vnni`, for what is computed: a graph for processors without VNNI is right on all of them."""
    monkeypatch.setenv(VARIABLE, "+vnni" if request.param else "-vnni")
    return request.param


def tiny_pipeline(seed=0):
    """A class-conditional pipeline with 30-odd layers and 20 thousand parameters."""
    from diffusers import DDIMScheduler, UNet2DModel

    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 12),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=4,
        ).eval()
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    return ClassConditionalPipeline(unet, scheduler, null_class=3)


@pytest.fixture
def tiny():
    return load_source(tiny_pipeline())


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The digits at W4A4 without fine-tuning, four steps."""
    out = tmp_path_factory.mktemp("digits") / "run"
    quantize("digits", {"method": "search", "steps": 4, "calibration": {"images": 16}}, out)
    return out


@pytest.fixture(scope="session")
def digits_onnx(digits_run):
    out = digits_run.parent / "onnx"
    export(digits_run, out)
    return out
