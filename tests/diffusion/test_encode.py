"""What the denoiser is told about prompts is what the pipeline's own call tells it."""

import pytest
import torch

from tests.families.pipelines import build
from trtq.diffusion.encode import takes_negative
from trtq.diffusion.loading import open_pipeline
from trtq.errors import UsageError


def told_by_the_pipeline(source, **prompts):
    """The inputs of the denoiser in a call of the pipeline, by flat name; "no prompt" first."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(source.family.flatten(kwargs))

    hook = source.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    height, width = source.image_size
    options = {"height": height, "width": width, "output_type": "latent", "guidance_scale": 3.0}
    if "pixart" in type(source.pipeline).__name__.lower():
        options["use_resolution_binning"] = False
    source.pipeline(num_inference_steps=2, **prompts, **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("negative", [None, "", "a blue square"], ids=repr)
@pytest.mark.parametrize("name", ["sd_1", "sd_xl", "pixart", "sd_3"])
def test_no_condition_is_what_the_pipeline_makes_of_the_negative_prompt(name, negative):
    source = open_pipeline(build(name))
    source = source.sized("16x16")
    for part in source.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    given = {} if negative is None else {"negative_prompt": negative}
    seen = told_by_the_pipeline(source, prompt="a red circle", **given)
    encoded = source.encode(["a red circle"], negative)
    assert encoded.unconditional.keys() == encoded.conditional.keys()
    for key, value in encoded.unconditional.items():
        assert torch.equal(torch.cat([value, encoded.conditional[key]]), seen[key]), key


def test_an_empty_negative_prompt_is_not_none_for_stable_diffusion_xl():
    """It has zeros where there is no text."""
    source = open_pipeline(build("sd_xl"))
    none, empty = (
        source.encode(["a"], negative).unconditional["encoder_hidden_states"]
        for negative in (None, "")
    )
    assert int(none.count_nonzero()) == 0
    assert int(empty.count_nonzero()) > 0


@pytest.mark.parametrize("name", ["ldm_kl", "flux"])
def test_pipelines_without_a_negative_prompt_refuse_one(name):
    source = open_pipeline(build(name))
    assert not takes_negative(source.pipeline)
    with pytest.raises(UsageError, match="takes no negative prompt"):
        source.encode(["a"], "b")
    assert source.encode(["a"], "").conditional.keys() == source.encode(["a"]).conditional.keys()


def test_a_sized_source_leaves_the_first_as_it_is():
    source = open_pipeline(build("sd_xl"))
    other = source.sized("24x32")
    assert (source.image_size, other.image_size) == ((16, 16), (24, 32))
    assert other.encode(["a"]).conditional["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]
    assert source.encode(["a"]).conditional["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
