"""Whether a pipeline's noise levels and inputs are known in closed form, or have to be recorded.

The closed form covers calls that turn noise into images of a prompt, of a class or of nothing. What a
call takes decides, not its pipeline: an argument that is not covered means an input that only the
pipeline itself can make. A denoiser that needs other inputs than its pipeline passes is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from trtq.checkpoint.components import AUTOENCODERS, TEXT_ENCODERS
from trtq.checkpoint.layout import INDEX_NAME
from trtq.diffusion.encode import encodes_text
from trtq.diffusion.families import FAMILIES
from trtq.errors import UsageError

__all__ = ["check_inputs", "check_needs", "recording_reason"]

_COVERED = re.compile(
    r"(negative_)?(pooled_)?prompt(_\d)?(_embeds|_attention_mask)?"
    r"|height|width|batch_size|num_images_per_prompt|class_labels|latents|generator"
    r"|num_inference_steps|timesteps|sigmas|mu|eta|denoising_end"
    r"|guidance_(scale|rescale)|true_cfg_scale|skip_(layer_)?guidance_\w+"
    r"|(negative_)?(original_size|target_size|crops_coords_top_left|ip_adapter_image(_embeds)?)"
    r"|(cross|joint)_attention_kwargs|clip_skip|clean_caption|max_sequence_length"
    r"|use_(resolution_binning|clipped_model_output)|output_type|return_dict|callback\w*"
)
"""Arguments of calls that the closed form covers, with their defaults or values of trtq."""
_FURTHER_INPUTS: tuple[tuple[str, str, str], ...] = (
    (
        "time_cond_proj_dim",
        "the guidance as an embedding (timestep_cond, latent consistency models)",
        "e.g. the base model with an LCM LoRA",
    ),
    ("encoder_hid_dim_type", "an image (IP-Adapter)", "or call pipe.unload_ip_adapter() first"),
)
"""Settings of a UNet whose pipeline makes a further input: name, the input, advice."""
_NO_INPUT = (None, "text_proj")
"""Values of these settings without a further input."""
_NOT_PASSED: tuple[tuple[str, tuple[str | None, ...], str], ...] = (
    ("num_class_embeds", (None,), "class labels"),
    ("class_embed_type", (None,), "class labels"),
    ("encoder_hid_dim_type", (None,), "embeddings of an image or of another text encoder"),
    ("encoder_hid_dim", (None,), "embeddings of an image or of another text encoder"),
    ("addition_embed_type", (None, "text_time"), "an embedding"),
    ("attention_type", (None, "default"), "boxes or images"),
)
"""Settings of a text-conditional denoiser: name, values without a further input, the input."""
_EXTRA_CHANNELS = {
    5: "a depth map",
    7: "the small image of super-resolution",
    8: "the latents of an image (editing by instruction, or video)",
    9: "a mask and the masked image's latents (inpainting)",
}
_WITHOUT = "which trtq does not pass; choose a model without this input"


def recording_reason(
    pipeline_class: Any, model_class: str, config: Mapping[str, Any], autoencoder: Mapping[str, Any]
) -> str | None:
    """The reason why a pipeline's inputs are not known in closed form; None if they are.

    Args:
        pipeline_class: class of the pipeline.
        model_class: class name of its denoiser.
        config: configuration of its denoiser.
        autoencoder: configuration of its autoencoder; empty if it has none.
    """
    call = pipeline_class.__call__
    if not str(getattr(call, "__module__", "")).startswith(("diffusers.", "trtq.")):
        return "its call is defined outside diffusers"
    if model_class not in FAMILIES:
        return f"its denoiser is a {model_class}; supported are {', '.join(FAMILIES)}"
    accepted = inspect.signature(call).parameters
    for name, parameter in accepted.items():
        collects = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name != "self" and not collects and not _COVERED.fullmatch(name):
            return f"its call takes {name!r}"
    for name, what, _ in _FURTHER_INPUTS:
        if config.get(name) not in _NO_INPUT:
            return f"its denoiser also takes {what}"
    components = inspect.signature(pipeline_class.__init__).parameters.keys()
    if "prompt" in accepted and not components & set(AUTOENCODERS):
        return "it has no autoencoder"
    channels = autoencoder.get("out_channels")
    if isinstance(channels, int) and channels > 4:
        return f"its autoencoder decodes {channels} channels"
    return None


def check_inputs(denoiser: Any, place: str) -> None:
    """Raise if a pipeline makes inputs of its denoiser that have to be recorded.

    Args:
        denoiser: component that predicts the noise.
        place: the denoiser, for messages.

    Raises:
        UsageError: there is such an input, e.g. the guidance scale or an image.
    """
    for name, what, advice in _FURTHER_INPUTS:
        # Loading an IP-Adapter sets the attribute and not the entry.
        value = getattr(getattr(denoiser, "config", None), name, None)
        if value not in _NO_INPUT:
            raise UsageError(
                f"{place} has {name}={value!r}: its pipeline also passes {what}, which is recorded in "
                f"the pipeline's own call only; choose a model without this input, {advice}"
            )


def check_needs(pipeline: Any, denoiser_name: str, where: str) -> None:
    """Raise if a pipeline's denoiser needs inputs that trtq does not pass.

    Args:
        pipeline: diffusers pipeline.
        denoiser_name: component that predicts the noise.
        where: the user's name for the pipeline, used in messages.

    Raises:
        UsageError: the denoiser needs another input; the message names it.
    """
    denoiser = getattr(pipeline, denoiser_name)
    model_class, config = type(denoiser).__name__, denoiser.config
    place = f"{where}: the {denoiser_name} ({model_class})"
    check_inputs(denoiser, place)
    _check_channels(config, place)
    settings = _NOT_PASSED if encodes_text(pipeline) else _NOT_PASSED[1:2]
    for name, allowed, needed in settings:
        if config.get(name) not in allowed:
            raise UsageError(f"{place} has {name}={config[name]!r}: it needs {needed}, {_WITHOUT}")
    # Pipelines that pass the image size make it with this method.
    addition = config.get("addition_embed_type")
    if (addition == "text_time") != hasattr(pipeline, "_get_add_time_ids"):
        raise UsageError(
            f"{place} has addition_embed_type={addition!r}, which does not fit a "
            f"{type(pipeline).__name__}: that pipeline passes {'no ' if addition else ''}pooled text "
            "and image size"
        )
    reason = recording_reason(type(pipeline), model_class, config, {})
    if reason is not None:
        raise UsageError(
            f"{where}: {type(pipeline).__name__} is not known in closed form: {reason}; use it through "
            "its own call"
        )
    _check_parts(pipeline, where)
    _check_autoencoder(pipeline, config, place)


def _check_channels(config: Any, place: str) -> None:
    """Raise if the denoiser takes more channels than it returns."""
    given = config.get("in_channels")
    returned = config.get("out_channels") or given
    if not isinstance(given, int) or not isinstance(returned, int) or given <= returned:
        return
    extra = _EXTRA_CHANNELS.get(given, "another image") if returned in (3, 4) else "another image"
    if given == 2 * returned and returned == 3:
        extra = "the small image of super-resolution"
    raise UsageError(
        f"{place} takes {given} channels and returns {returned}: in addition to the noisy sample it "
        f"needs {extra}, {_WITHOUT}"
    )


def _check_parts(pipeline: Any, where: str) -> None:
    """Raise if only one of a text encoder and its tokenizer is there."""
    for encoder, tokenizer in TEXT_ENCODERS.items():
        names = [name for name in (encoder, tokenizer) if hasattr(pipeline, name)]
        absent = [name for name in names if getattr(pipeline, name) is None]
        if len(names) == 2 and len(absent) == 1:
            raise UsageError(
                f"{where}: the {type(pipeline).__name__} has no {absent[0]} (null in its {INDEX_NAME}), "
                "so trtq cannot encode prompts; load the pipeline with all its text encoders"
            )


def _check_autoencoder(pipeline: Any, config: Any, place: str) -> None:
    """Raise unless the autoencoder is of a supported class and fits the denoiser."""
    for name in AUTOENCODERS:
        autoencoder = getattr(pipeline, name, None)
        settings = getattr(autoencoder, "config", None)
        if autoencoder is None or settings is None:
            continue
        if not settings.get("block_out_channels"):
            raise UsageError(
                f"{place}: the {name} of its pipeline is a {type(autoencoder).__name__}, which trtq "
                "does not support; supported are AutoencoderKL and VQModel"
            )
        latent, given = settings.get("latent_channels"), config.get("in_channels")
        if hasattr(pipeline, "_pack_latents") and isinstance(given, int):
            given //= 4
        if isinstance(latent, int) and isinstance(given, int) and latent != given:
            raise UsageError(
                f"{place} takes latents of {given} channels, but the {name} produces {latent} channels; "
                "one of the two belongs to another model"
            )
    declared = [name for name in AUTOENCODERS if hasattr(pipeline, name)]
    if declared and all(getattr(pipeline, name) is None for name in declared):
        kind = type(pipeline).__name__
        raise UsageError(
            f"{place}: the {kind} has no {declared[0]}, so it cannot make images; load the pipeline "
            f"with its {declared[0]}"
        )
