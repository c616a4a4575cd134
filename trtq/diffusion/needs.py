"""Check that a denoiser needs no inputs that trtq does not pass yet.

trtq passes sample, timestep, and the encodings of prompts or classes (`trtq.diffusion.encode`). A
denoiser that needs other inputs (an image, a mask, frames) would compute wrong results and is refused.
"""

from __future__ import annotations

from typing import Any

from trtq.diffusion.encode import ENCODED_PIPELINES
from trtq.diffusion.layout import INDEX_NAME
from trtq.errors import UsageError

__all__ = ["check_needs"]

_EXTRA_CHANNELS = {
    5: "a depth map",
    7: "the small image of super-resolution",
    8: "the latents of an image (editing by instruction, or video)",
    9: "a mask and the masked image's latents (inpainting)",
}
_BY_NAME = {
    "ControlNet": "the residuals of a ControlNet",
    "T2IAdapter": "the features of a T2I-Adapter",
    "Adapter": "the features of an adapter",
    "Inpaint": "a mask and an image",
    "Img2Img": "a start image",
    "Image2Image": "a start image",
    "ImageVariation": "an image",
    "Upscale": "the small image",
    "SuperResolution": "the small image",
    "Video": "frames",
    "Animate": "frames",
    "Pix2Pix": "an image to edit",
    "Kontext": "an image to edit",
    "Depth": "a depth map",
    "PAG": "perturbed attention",
    "Audio": "sound",
}
_UNCONDITIONAL = (
    "ConsistencyModelPipeline",
    "DDIMPipeline",
    "DDPMPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "PNDMPipeline",
    "ScoreSdeVePipeline",
)
_TEXT_ENCODERS = {
    "LDMTextToImagePipeline": ("bert", "tokenizer"),
    "StableDiffusionPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ),
    "PixArtAlphaPipeline": ("text_encoder", "tokenizer"),
    "PixArtSigmaPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusion3Pipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "FluxPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}
_NOT_PASSED = "which trtq does not pass yet; choose a model without this input"


def check_needs(pipeline: Any, denoiser_name: str, where: str) -> None:
    """Raise if a pipeline's denoiser needs inputs that trtq does not pass.

    Args:
        pipeline: diffusers pipeline.
        denoiser_name: component that predicts the noise.
        where: the user's name for the pipeline, used in messages.

    Raises:
        UsageError: the denoiser needs another input; the message names it.
    """
    kind = type(pipeline).__name__
    denoiser = getattr(pipeline, denoiser_name)
    model_class = type(denoiser).__name__
    config = denoiser.config
    place = f"{where}: the {denoiser_name} ({model_class})"
    _check_channels(pipeline, config, model_class, place)
    if model_class == "UNet2DConditionModel":
        _check_text_unet(config, kind, place)
    elif model_class == "UNet2DModel" and config.get("class_embed_type") is not None:
        raise UsageError(
            f"{place} has class_embed_type {config.class_embed_type!r}: it needs a class embedding, "
            f"{_NOT_PASSED}"
        )
    _check_pipeline(pipeline, kind, model_class, where)
    _check_autoencoder(pipeline, config, place, kind)


def _check_channels(pipeline: Any, config: Any, model_class: str, place: str) -> None:
    """Raise if the denoiser takes more channels than it returns."""
    given = config.get("in_channels")
    returned = config.get("out_channels") or given
    if not isinstance(given, int) or not isinstance(returned, int) or given <= returned:
        return
    if model_class == "FluxTransformer2DModel" and given != returned:
        extra = "the latents of an image (Fill, Control, Kontext)"
    else:
        extra = (
            _EXTRA_CHANNELS.get(given, "another image") if returned in (3, 4) else "another image"
        )
        if given == 2 * returned and returned == 3:
            extra = "the small image of super-resolution"
    raise UsageError(
        f"{place} takes {given} channels and returns {returned}: in addition to the noisy sample it "
        f"needs {extra}, {_NOT_PASSED}"
    )


def _check_text_unet(config: Any, kind: str, place: str) -> None:
    """Raise if a text-conditional UNet needs more than the text of its pipeline."""
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        key = (
            "num_class_embeds" if config.get("num_class_embeds") is not None else "class_embed_type"
        )
        raise UsageError(
            f"{place} has {key} {config[key]!r}: in addition to the text it needs class labels, "
            f"{_NOT_PASSED}"
        )
    # Loading an IP-Adapter sets the attribute and not the entry.
    projection = getattr(config, "encoder_hid_dim_type", None)
    if projection is not None or config.get("encoder_hid_dim") is not None:
        setting = projection or config.get("encoder_hid_dim")
        needed = (
            "the images of an IP-Adapter (pipe.unload_ip_adapter() removes it)"
            if setting == "ip_image_proj"
            else "embeddings of an image or of another text encoder"
        )
        raise UsageError(
            f"{place} has encoder_hid_dim_type {setting!r}: it needs {needed}, {_NOT_PASSED}"
        )
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise UsageError(
            f"{place} has addition_embed_type {addition!r}: in addition to the text it needs an "
            f"embedding, {_NOT_PASSED}"
        )
    if (addition == "text_time") != (
        kind == "StableDiffusionXLPipeline"
    ) and kind in _TEXT_ENCODERS:
        raise UsageError(
            f"{place} has addition_embed_type {addition!r}, which does not fit a {kind}: "
            + (
                "only StableDiffusionXLPipeline passes pooled text and image size"
                if addition
                else "that pipeline passes pooled text and image size"
            )
        )
    if config.get("attention_type", "default") != "default":
        raise UsageError(
            f"{place} has attention_type {config.attention_type!r}: it needs boxes or images, "
            f"{_NOT_PASSED}"
        )


def _check_pipeline(pipeline: Any, kind: str, model_class: str, where: str) -> None:
    """Raise unless the pipeline is of a supported class and has its text encoders."""
    supported = (*sorted(ENCODED_PIPELINES), "DiTPipeline", *_UNCONDITIONAL)
    if hasattr(pipeline, "classes"):
        return
    if kind not in supported:
        needed = next((what for part, what in _BY_NAME.items() if part in kind), None)
        reason = f": its denoiser needs {needed}, which trtq does not pass yet" if needed else ""
        raise UsageError(
            f"{where}: {kind} with a {model_class} is not supported{reason}; supported pipelines: "
            f"{', '.join(supported)}"
        )
    absent = [
        name for name in _TEXT_ENCODERS.get(kind, ()) if getattr(pipeline, name, None) is None
    ]
    if absent:
        raise UsageError(
            f"{where}: the {kind} has no {', '.join(absent)} (null in its {INDEX_NAME}), so trtq cannot "
            "encode prompts; load the pipeline with all its text encoders"
        )


def _check_autoencoder(pipeline: Any, config: Any, place: str, kind: str) -> None:
    """Raise unless the autoencoder is of a supported class and fits the denoiser."""
    for name in ("vae", "vqvae"):
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
        if kind == "FluxPipeline" and isinstance(given, int):
            given //= 4
        if isinstance(latent, int) and isinstance(given, int) and latent != given:
            raise UsageError(
                f"{place} takes latents of {given} channels, but the {name} produces {latent} channels; "
                "one of the two belongs to another model"
            )
    autoencoders = [getattr(pipeline, name, None) for name in ("vae", "vqvae")]
    if kind in ENCODED_PIPELINES and not any(part is not None for part in autoencoders):
        raise UsageError(
            f"{place}: the {kind} has no vae, so it cannot make images; load the pipeline with its vae"
        )
