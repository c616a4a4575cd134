"""Encode prompts and classes: the inputs of a denoiser other than sample and timestep.

One function per pipeline class encodes prompts. Each returns values with a batch axis for the prompts,
the same values for "no prompt" if the model uses classifier-free guidance, and values without a batch
axis. Letters: P prompts.
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
"""Guidance scale for models that take it as an input; the default of Flux's pipeline."""


@dataclass(frozen=True)
class Encoded:
    """Inputs of a denoiser, by flat name.

    Attributes:
        conditional: inputs for the prompts, `[P, ...]` each.
        unconditional: inputs for no prompt or a negative prompt, `[1, ...]` each; None if the guidance
            scale is an input.
        shared: inputs without a batch axis.
    """

    conditional: dict[str, Tensor]
    unconditional: dict[str, Tensor] | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)


def _image_size(pipeline: Any, latent: tuple[int, int]) -> tuple[int, int]:
    return latent[0] * pipeline.vae_scale_factor, latent[1] * pipeline.vae_scale_factor


def _repeated(negative: str | None, prompts: list[str]) -> list[str] | None:
    """A negative prompt as a list, as pipelines require it together with a list of prompts."""
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
    # The base model takes original size, crop offset and target size: here the image size and no crop.
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
        hidden: Tensor = pipeline.bert(ids.to(pipeline.bert.device))[0]
        return hidden

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
    # PixArt-alpha at 1024 pixels takes the size as an input; diffusers tests for the same number.
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
"""Classes of pipelines with supported prompts."""
_FURTHER_INPUTS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "time_cond_proj_dim",
        (),
        "the guidance as an embedding (timestep_cond, latent consistency models)",
        "choose a model without it, e.g. the base model with an LCM LoRA",
    ),
    (
        "encoder_hid_dim_type",
        ("text_proj",),
        "an image (IP-Adapter)",
        "call pipe.unload_ip_adapter() before saving it, or choose a model without it",
    ),
)
"""Settings of a UNet: name, values without a further input, name of the further input, advice."""
_WITHOUT_NEGATIVE = ("LDMTextToImagePipeline", "FluxPipeline")
"""Pipelines without a negative prompt; Flux's uses one only with a separate guidance scale."""


def encodes_text(pipeline: Any) -> bool:
    """Whether a pipeline takes prompts."""
    return type(pipeline).__name__ in _ENCODERS or hasattr(pipeline, "encode_prompt")


def takes_negative(pipeline: Any) -> bool:
    """Whether a pipeline takes a negative prompt."""
    return encodes_text(pipeline) and type(pipeline).__name__ not in _WITHOUT_NEGATIVE


def check_inputs(pipeline: Any) -> None:
    """Raise unless trtq passes all inputs that the pipeline itself passes to its denoiser.

    Raises:
        UsageError: the pipeline passes a further input, e.g. the guidance scale or an image.
    """
    denoiser = getattr(pipeline, "unet", None)
    config = getattr(denoiser, "config", None)
    for name, allowed, what, advice in _FURTHER_INPUTS:
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
        pipeline: diffusers pipeline.
        prompts: P prompts.
        latent: height and width of the latents, in cells.
        negative: negative prompt of all images; None: the pipeline's encoding of no prompt, which for
            Stable Diffusion XL differs from the encoding of an empty prompt.

    Returns:
        The encodings, tensors on the CPU.

    Raises:
        UsageError: the pipeline is of an unsupported class, or takes no negative prompt.
    """
    name = type(pipeline).__name__
    if name not in _ENCODERS:
        raise UsageError(
            f"{name} is not supported; supported pipelines: {', '.join(sorted(_ENCODERS))}"
        )
    if negative and not takes_negative(pipeline):
        raise UsageError(f"{name} takes no negative prompt; leave it out")
    check_inputs(pipeline)
    with quiet_diffusers():
        encoded = _ENCODERS[name](pipeline, prompts, latent, negative)
    return Encoded(
        {key: value.cpu() for key, value in encoded.conditional.items()},
        encoded.unconditional
        and {key: value.cpu() for key, value in encoded.unconditional.items()},
        {key: value.cpu() for key, value in encoded.shared.items()},
    )


def class_count(pipeline: Any) -> int | None:
    """Number of a pipeline's classes, not counting "no class"; None if it takes no classes."""
    if hasattr(pipeline, "classes"):
        return int(pipeline.classes)
    if type(pipeline).__name__ == "DiTPipeline":
        return int(pipeline.transformer.config.num_embeds_ada_norm)
    return None


def class_conditions(pipeline: Any, labels: Tensor) -> Conditions:
    """Conditions for images of the classes `labels[B]`.

    Args:
        pipeline: class-conditional diffusers pipeline.
        labels: class labels, LongTensor[B].

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
    # In DiT the label after the last class means "no class".
    null = pipeline.config.null_class if hasattr(pipeline, "classes") else classes
    unconditional = None if null is None else {"class_labels": torch.full_like(labels, null)}
    return Conditions({"class_labels": labels}, unconditional)
