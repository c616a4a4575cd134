"""What a pipeline makes of prompts and classes: the inputs of its denoiser beside sample and timestep.

For prompts there is one function per kind of pipeline; all give the same: values with a batch axis for
the prompts, the same for "no prompt" if the model knows guidance by two predictions, and values without
a batch axis.
Letters: P prompts, S tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.sampling import Conditions
from trtq.errors import UsageError

__all__ = [
    "EMBEDDED_GUIDANCE",
    "ENCODED_PIPELINES",
    "Encoded",
    "check_inputs",
    "class_conditions",
    "class_count",
    "encode_prompts",
    "encodes_text",
    "takes_negative",
]


EMBEDDED_GUIDANCE = 3.5
"""What models that take guidance as an input are told; the default of Flux's pipeline."""


@dataclass(frozen=True)
class Encoded:
    """Inputs of the denoiser by flat name.

    Attributes:
        conditional: of the prompts, each `[P, ...]`.
        unconditional: of no prompt or a negative one, each `[1, ...]`; None where guidance is an input.
        shared: values without a batch axis.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)


def _image_size(pipeline: Any, latent: tuple[int, int]) -> tuple[int, int]:
    return latent[0] * pipeline.vae_scale_factor, latent[1] * pipeline.vae_scale_factor


def _repeated(negative: str | None, prompts: list[str]) -> list[str] | None:
    """A negative prompt in the form that pipelines want beside a list of prompts."""
    return None if negative is None else [negative] * len(prompts)


def _stable_diffusion(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    device = pipeline.text_encoder.device
    states, empty = pipeline.encode_prompt(
        prompts, device, 1, True, negative_prompt=_repeated(negative, prompts)
    )
    return Encoded({"encoder_hidden_states": states}, {"encoder_hidden_states": empty[:1]})


def _stable_diffusion_xl(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    states, empty, pooled, no_pooled = pipeline.encode_prompt(
        prompts,
        device=pipeline.text_encoder_2.device,
        do_classifier_free_guidance=True,
        negative_prompt=_repeated(negative, prompts),
    )
    size = _image_size(pipeline, latent)
    # The base model is told: drawn at this size, not cropped, wanted at this size.
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=states.device)
    return Encoded(
        {
            "encoder_hidden_states": states,
            "text_embeds": pooled,
            "time_ids": time_ids.expand(len(states), -1),
        },
        {
            "encoder_hidden_states": empty[:1],
            "text_embeds": no_pooled[:1],
            "time_ids": time_ids,
        },
    )


def _latent_diffusion(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    def states(texts: list[str]) -> Tensor:
        ids = pipeline.tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        found: Tensor = pipeline.bert(ids.to(pipeline.bert.device))[0]
        return found

    return Encoded(
        {"encoder_hidden_states": states(prompts)}, {"encoder_hidden_states": states([""])}
    )


def _pixart(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    states, mask, empty, empty_mask = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=True,
        device=pipeline.text_encoder.device,
        negative_prompt=negative or "",
    )
    halves = [
        {"encoder_hidden_states": states, "encoder_attention_mask": mask},
        {"encoder_hidden_states": empty[:1], "encoder_attention_mask": empty_mask[:1]},
    ]
    # PixArt-alpha at 1024 pixels is told the size; diffusers decides it by the same number.
    if pipeline.transformer.config.sample_size == 128:
        height, width = _image_size(pipeline, latent)
        for half in halves:
            count = len(half["encoder_hidden_states"])
            half["resolution"] = torch.tensor([[height, width]], dtype=states.dtype).repeat(
                count, 1
            )
            half["aspect_ratio"] = torch.tensor([[height / width]], dtype=states.dtype).repeat(
                count, 1
            )
    return Encoded(halves[0], halves[1])


def _stable_diffusion_3(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    states, empty, pooled, no_pooled = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=True,
        negative_prompt=_repeated(negative, prompts),
    )
    return Encoded(
        {"encoder_hidden_states": states, "pooled_projections": pooled},
        {"encoder_hidden_states": empty[:1], "pooled_projections": no_pooled[:1]},
    )


def _flux(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None
) -> Encoded:
    states, pooled, text_ids = pipeline.encode_prompt(prompt=prompts, prompt_2=None)
    image_ids = pipeline._prepare_latent_image_ids(
        1, latent[0] // 2, latent[1] // 2, states.device, states.dtype
    )
    conditional = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if pipeline.transformer.config.guidance_embeds:
        conditional["guidance"] = torch.full((len(states),), EMBEDDED_GUIDANCE)
    return Encoded(conditional, None, {"txt_ids": text_ids, "img_ids": image_ids})


_Encoder = Callable[[Any, list[str], tuple[int, int], str | None], Encoded]
_ENCODERS: dict[str, _Encoder] = {
    "LDMTextToImagePipeline": _latent_diffusion,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}
ENCODED_PIPELINES = frozenset(_ENCODERS)
"""Names of the pipelines whose prompts can be encoded."""


_TOLD: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "time_cond_proj_dim",
        (),
        "the guidance as an embedding (timestep_cond, latent consistency models)",
        "take a model without it, e.g. the plain one with an LCM LoRA",
    ),
    (
        "encoder_hid_dim_type",
        ("text_proj",),
        "an image (IP-Adapter)",
        "call pipe.unload_ip_adapter() before saving it, or take a model without it",
    ),
)
"""Of a UNet: a setting, its values without a further input, the further input of others, advice."""


_WITHOUT_NEGATIVE = ("LDMTextToImagePipeline", "FluxPipeline")
"""The first has no such argument; the second's takes a guidance of its own, beside the embedded one."""


def encodes_text(pipeline: Any) -> bool:
    """Whether this kind of pipeline draws what a prompt says."""
    return type(pipeline).__name__ in _ENCODERS or hasattr(pipeline, "encode_prompt")


def takes_negative(pipeline: Any) -> bool:
    """Whether a text may stand in the place of "no prompt"."""
    return encodes_text(pipeline) and type(pipeline).__name__ not in _WITHOUT_NEGATIVE


def check_inputs(pipeline: Any) -> None:
    """Nothing, if trtq passes this pipeline's denoiser all that the pipeline itself passes it.

    Raises:
        UsageError: the pipeline passes more, e.g. the guidance or an image.
    """
    denoiser = getattr(pipeline, "unet", None)
    config = getattr(denoiser, "config", None)
    for name, allowed, what, advice in _TOLD:
        value = getattr(config, name, None)
        if value is not None and value not in allowed:
            raise UsageError(
                f"the UNet of {type(pipeline).__name__} has {name}={value!r}: the pipeline also passes "
                f"{what}, which trtq does not record yet, so calibration would miss it; {advice}"
            )


@torch.no_grad()
def encode_prompts(
    pipeline: Any, prompts: list[str], latent: tuple[int, int], negative: str | None = None
) -> Encoded:
    """Encode prompts as the pipeline itself does.

    Args:
        pipeline: a diffusers pipeline.
        prompts: P texts.
        latent: height and width of the latents.
        negative: what the images are not to show, for all prompts; None: what the pipeline makes of
            no text, which for Stable Diffusion XL is not what it makes of an empty one.

    Returns:
        Tensors on the CPU.

    Raises:
        UsageError: this kind of pipeline is not supported, or takes no negative prompt.
    """
    name = type(pipeline).__name__
    if name not in _ENCODERS:
        raise UsageError(f"{name} is not supported; supported are {', '.join(sorted(_ENCODERS))}")
    if negative and not takes_negative(pipeline):
        raise UsageError(f"{name} takes no negative prompt")
    check_inputs(pipeline)
    with quiet_diffusers():
        found = _ENCODERS[name](pipeline, prompts, latent, negative)
    return Encoded(
        {key: value.cpu() for key, value in found.conditional.items()},
        found.unconditional and {key: value.cpu() for key, value in found.unconditional.items()},
        {key: value.cpu() for key, value in found.shared.items()},
    )


def class_count(pipeline: Any) -> int | None:
    """The number of classes that a pipeline draws, "no class" left out; None if it takes no classes."""
    if hasattr(pipeline, "classes"):
        return int(pipeline.classes)
    if type(pipeline).__name__ == "DiTPipeline":
        return int(pipeline.transformer.config.num_embeds_ada_norm)
    return None


def class_conditions(pipeline: Any, labels: Tensor) -> Conditions:
    """labels[B] -> what the denoiser needs to know.

    Raises:
        UsageError: a label is not one of the model's classes.
    """
    classes = class_count(pipeline)
    if classes is None:
        raise UsageError(f"{type(pipeline).__name__} takes no classes")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise UsageError(
            f"class labels must lie in 0 .. {classes - 1}, got "
            f"{int(labels.min())} .. {int(labels.max())}"
        )
    # DiT's label behind the last class stands for "no class".
    null = pipeline.config.null_class if hasattr(pipeline, "classes") else classes
    unconditional = None if null is None else {"class_labels": torch.full_like(labels, null)}
    return Conditions({"class_labels": labels}, unconditional)
