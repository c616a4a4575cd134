"""Every kind of pipeline is served: taken apart, it draws what it draws whole."""

import pytest
import torch

from tests.families.pipelines import PIPELINES, build
from tests.serve.test_batcher import Crowd
from trtq.diffusion.source import load_source
from trtq.errors import UsageError
from trtq.evaluate.images import Subjects, draw
from trtq.serve.batcher import Batcher
from trtq.serve.light import pixels
from trtq.serve.pipeline import PipelineModel

STEPS = 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("pixart", "ldm_kl") else name
        for name in PIPELINES
        if name != "flux"
    ],
)
def test_a_served_pipeline_draws_what_it_draws_whole(name):
    pipeline = build(name)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # As from a folder: labels and texts are dropped at random in training.
    source = load_source(pipeline)
    model = PipelineModel(source, name, "torch")
    # DiT's pipeline takes class 1000 for "no class", which a small model has not.
    guidance = 3.0 if model.card.takes_guidance and name != "dit" else 1.0
    prompt = {"text": "a red circle", "class": "1", "none": ""}[model.card.kind]
    crowd, batcher = Crowd(model), Batcher(model, most_rows=4)
    batcher.put(crowd.items(4, STEPS, guidance, count=2, prompt=prompt))
    found = crowd.wait(2, seconds=300)
    batcher.close(RuntimeError("closed"))
    subjects = Subjects(
        2,
        classes=torch.tensor([1, 1]) if model.card.kind == "class" else None,
        prompts=[prompt] * 2 if model.card.kind == "text" else None,
    )
    expected = draw(source, subjects, steps=STEPS, seed=4, guidance=guidance)
    for index in range(2):
        ours = torch.from_numpy(model.decode(found[4, index])).int()
        theirs = torch.from_numpy(pixels(expected[index : index + 1].numpy(), name)).int()
        assert ours.shape == (*model.card.image_size, 3)
        assert int((ours - theirs).abs().max()) <= 1
        assert int(ours.max()) - int(ours.min()) > 10


def test_packed_latents_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match="draw with `trtq generate`"):
        PipelineModel(load_source(build("flux")), "flux", "torch")


def test_a_model_without_prompts_refuses_them():
    model = PipelineModel(load_source(build("ldm_vq")), "ldm", "torch")
    with pytest.raises(UsageError, match="takes no prompt"):
        Crowd(model).items(1, prompt="a cat")
