"""Opening a pipeline: from a folder, a shipped model, a hub id or a pipeline object."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from trtq.diffusion.checkpoint import load_pipeline
from trtq.diffusion.conditioning import UNLABELLED_PIPELINES
from trtq.diffusion.encode import check_inputs
from trtq.diffusion.layout import (
    CONFIG_NAME,
    INDEX_NAME,
    check_null_class,
    read_json,
    read_null_class,
)
from trtq.diffusion.needs import check_needs
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prepared import plain_pipeline
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.shipped import shipped_model, shipped_models
from trtq.diffusion.weight_files import single_file_refusal
from trtq.diffusion.wording import one_line
from trtq.errors import ArtefactError, QuantizationError, UsageError
from trtq.quant.stand_in import StandIn
from trtq.torch_settings import with_own_settings

__all__ = ["DENOISERS", "find_denoiser", "open_pipeline", "resolve_model", "wrap_pipeline"]

DENOISERS = ("unet", "transformer", "decoder", "prior")
"""Names of the component that predicts the noise, in order of precedence."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def find_denoiser(pipeline: Any) -> str:
    """Name of the component that predicts the noise.

    Raises:
        QuantizationError: the pipeline has no such component.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    components = ", ".join(sorted(getattr(pipeline, "components", {}))) or "none"
    raise QuantizationError(
        f"{type(pipeline).__name__} has no denoiser: a component {', '.join(DENOISERS[:-1])} or "
        f"{DENOISERS[-1]} is required, "
        f"its components are: {components}"
    )


def resolve_model(model: str | Path) -> Path | str:
    """The folder that a model argument denotes, or the argument itself if it is a hub id.

    Args:
        model: folder of a pipeline, name of a shipped model, or hub id.

    Raises:
        ArtefactError: the argument is neither a folder, a shipped model nor a hub id.
    """
    shipped = shipped_model(str(model))
    if shipped is not None and not Path(model).is_dir():
        return shipped
    folder, name = Path(model), str(model)
    if "\0" in name:
        raise ArtefactError(
            f"the model name {one_line(repr(name))} holds a NUL character; remove it"
        )
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
        if (is_folder and not (folder / INDEX_NAME).is_file()) or (exists and not is_folder):
            raise ArtefactError(_no_pipeline(folder))
    except OSError as err:
        raise ArtefactError(f"cannot read {one_line(repr(name))}: {err.strerror}") from err
    if is_folder:
        return folder
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return name
    raise ArtefactError(
        f"there is no model {one_line(repr(name))}: it is not a folder, not a hub id (owner/name), and "
        f"not a model that ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def _no_pipeline(path: Path) -> str:
    """Message about an existing file or folder that is not a pipeline."""
    single = None if (path / CONFIG_NAME).is_file() else single_file_refusal(path)
    if single is not None:
        return single
    if not path.is_dir():
        return f"{path} is a file, not a pipeline; give the folder that holds its {INDEX_NAME}"
    if (path / CONFIG_NAME).is_file():
        class_name = read_json(path / CONFIG_NAME).get("_class_name")
        return (
            f"{path} is the folder of one component ({class_name or 'of an unnamed class'}) "
            f"and holds no {INDEX_NAME}; give the folder of the whole pipeline, with scheduler, "
            "text encoders and autoencoder"
        )
    subfolders = sorted(p.parent.name for p in path.glob(f"*/{INDEX_NAME}"))
    hint = f", e.g. its subfolder {subfolders[0]!r}" if subfolders else ""
    return f"{path} holds no {INDEX_NAME}; give the folder of a whole pipeline{hint}"


def wrap_pipeline(pipeline: Any, null_class: int | None = None, scheduler: Any = None) -> Any:
    """Put a class-conditional `UNet2DModel` into a pipeline that passes class labels.

    Pipelines without such a UNet and pipelines with their own sampler are returned unchanged.

    Args:
        pipeline: diffusers pipeline.
        null_class: label that means "no class"; None: the model has no such label.
        scheduler: scheduler to use if the pipeline has replaced it; None: the pipeline's scheduler.

    Raises:
        ArtefactError: the label is out of range.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None or getattr(unet.config, "num_class_embeds", None) is None:
        return pipeline
    if "encoder_hid_dim" in unet.config or hasattr(pipeline, "classes"):
        return pipeline
    if type(pipeline).__name__ not in UNLABELLED_PIPELINES:
        return pipeline
    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    check_null_class(null_class, int(unet.config.num_class_embeds))
    chosen = pipeline.scheduler if scheduler is None else scheduler
    return ClassConditionalPipeline(unet, chosen, null_class)


@with_own_settings
def open_pipeline(model: str | Path | Any, *, recorded: bool = False) -> LoadedPipeline:
    """Load a pipeline in float32, from safetensors only, with all tensors checked.

    Args:
        model: diffusers folder, name of a shipped model, hub id, or pipeline object. An object is not
            changed: its models are built again, see `trtq.diffusion.prepared`.
        recorded: whether the caller records the pipeline's own call. Such a pipeline keeps its class,
            and its denoiser may need any input.

    Raises:
        ArtefactError: the model is missing or cannot be read, or its weights do not fit.
        QuantizationError: the pipeline has no denoiser, or a weight is not a finite number.
        UsageError: the denoiser needs inputs that trtq does not pass, or the object has a change that
            would be lost by rebuilding.
    """
    if not isinstance(model, str | Path):
        return _open_object(model, recorded=recorded)
    place = resolve_model(model)
    folder = place if isinstance(place, Path) else None
    pipeline = load_pipeline(folder if folder is not None else _downloaded(str(place)))
    name = find_denoiser(pipeline)
    if not recorded:
        null_class = read_null_class(folder) if folder is not None else None
        pipeline = wrap_pipeline(pipeline, null_class)
        check_needs(pipeline, name, str(model))
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(str(model), folder, pipeline, name)


def _open_object(pipeline: Any, *, recorded: bool) -> LoadedPipeline:
    """Open a pipeline object; a low-bit pipeline of trtq is used unchanged."""
    if isinstance(pipeline, nn.Module):
        raise UsageError(
            f"a whole pipeline is required, got the model {type(pipeline).__name__} alone; put the "
            "model into a pipeline, or give the folder of the pipeline"
        )
    name = find_denoiser(pipeline)
    if not isinstance(getattr(pipeline, name), StandIn):
        if recorded:
            pipeline = plain_pipeline(pipeline)
        else:
            # Check before rebuilding, too: settings that an adapter added do not fit a plain model.
            check_inputs(pipeline)
            pipeline = wrap_pipeline(plain_pipeline(pipeline))
            check_needs(pipeline, name, type(pipeline).__name__)
    return LoadedPipeline(type(pipeline).__name__, None, pipeline, name)


def _downloaded(name: str) -> Path:
    """Download a hub id into the hub's cache.

    Raises:
        ArtefactError: the repository does not exist or cannot be reached.
    """
    from diffusers import DiffusionPipeline

    try:
        with quiet_diffusers():
            folder = DiffusionPipeline.download(name, use_safetensors=True)
    # The hub's client and diffusers let any exception of their network libraries through.
    except Exception as err:
        raise ArtefactError(
            f"cannot load the pipeline {name!r} from the hub ({one_line(err)}); check the name and "
            "the connection, or download the pipeline (`hf download`) and give its folder"
        ) from err
    return Path(folder)
