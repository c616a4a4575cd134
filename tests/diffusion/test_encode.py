"""The encoded prompts equal the denoiser inputs of the pipeline's own call."""

import pytest
import torch

from tests.families.pipelines import build
from trtq.diffusion.encode import takes_negative
from trtq.diffusion.loading import open_pipeline
from trtq.errors import UsageError


def inputs_of_the_call(loaded, **prompts):
    """Denoiser inputs in the pipeline's own call, by flat name; "no prompt" is the first row."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(loaded.family.flatten(kwargs))

    hook = loaded.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    height, width = loaded.image_size
    options = {"height": height, "width": width, "output_type": "latent", "guidance_scale": 3.0}
    if "pixart" in type(loaded.pipeline).__name__.lower():
        options["use_resolution_binning"] = False
    loaded.pipeline(num_inference_steps=2, **prompts, **options)
    hook.remove()
    return seen


@pytest.mark.parametrize("negative", [None, "", "a blue square"], ids=repr)
@pytest.mark.parametrize("name", ["sd_1", "sd_xl", "pixart", "sd_3"])
def test_the_unconditional_input_is_the_pipelines_encoding_of_the_negative_prompt(name, negative):
    loaded = open_pipeline(build(name)).sized("16x16")
    for part in loaded.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    given = {} if negative is None else {"negative_prompt": negative}
    seen = inputs_of_the_call(loaded, prompt="a red circle", **given)
    encoded = loaded.encode(["a red circle"], negative)
    assert encoded.unconditional.keys() == encoded.conditional.keys()
    for key, value in encoded.unconditional.items():
        assert torch.equal(torch.cat([value, encoded.conditional[key]]), seen[key]), key


def test_stable_diffusion_xl_distinguishes_an_empty_negative_prompt_from_none():
    """Without a negative prompt the pipeline uses zeros."""
    loaded = open_pipeline(build("sd_xl"))
    none, empty = (
        loaded.encode(["a"], negative).unconditional["encoder_hidden_states"]
        for negative in (None, "")
    )
    assert int(none.count_nonzero()) == 0
    assert int(empty.count_nonzero()) > 0


@pytest.mark.parametrize("name", ["ldm_kl", "flux"])
def test_a_negative_prompt_is_refused_if_the_pipeline_does_not_support_it(name):
    loaded = open_pipeline(build(name))
    assert not takes_negative(loaded.pipeline, loaded.denoiser_name)
    with pytest.raises(UsageError, match="takes no negative prompt"):
        loaded.encode(["a"], "b")
    assert loaded.encode(["a"], "").conditional.keys() == loaded.encode(["a"]).conditional.keys()


def test_a_resized_copy_does_not_change_the_original():
    loaded = open_pipeline(build("sd_xl"))
    other = loaded.sized("24x32")
    assert (loaded.image_size, other.image_size) == ((16, 16), (24, 32))
    assert other.encode(["a"]).conditional["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]
    assert loaded.encode(["a"]).conditional["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
