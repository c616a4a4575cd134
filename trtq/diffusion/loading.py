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

DENOISERS = ("unet", "transformer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def find_denoiser(pipeline: Any) -> str:
    """The name of the component that predicts the noise.

    Raises:
        QuantizationError: there is none.
    """
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    components = ", ".join(sorted(getattr(pipeline, "components", {}))) or "none"
    raise QuantizationError(
        f"{type(pipeline).__name__} has no denoiser: looked for {' and '.join(DENOISERS)}, "
        f"its components are {components}"
    )


def resolve_model(model: str | Path) -> Path | str:
    """The folder that a model argument means, or the argument itself if it is a hub id.

    Raises:
        ArtefactError: neither a folder with a pipeline, nor a shipped name, nor shaped like an id.
    """
    shipped = shipped_model(str(model))
    if shipped is not None and not Path(model).is_dir():
        return shipped
    folder, name = Path(model), str(model)
    if "\0" in name:
        raise ArtefactError(f"the model's name {name!r} holds a NUL")
    try:
        is_folder, there = folder.is_dir(), folder.exists()
        if (is_folder and not (folder / INDEX_NAME).is_file()) or (there and not is_folder):
            raise ArtefactError(_no_pipeline(folder))
    except OSError as err:
        raise ArtefactError(f"cannot read {one_line(repr(name))}: {err.strerror}") from err
    if is_folder:
        return folder
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return name
    raise ArtefactError(
        f"there is no model {one_line(repr(name))}: not a folder, not a hub id (owner/name), and "
        f"not one that ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def _no_pipeline(path: Path) -> str:
    """Why a file or folder that is there is no pipeline's, and what to do."""
    single = None if (path / "config.json").is_file() else single_file_refusal(path)
    if single is not None:
        return single
    if not path.is_dir():
        return f"{path} is a file and no pipeline; give the folder that holds its {INDEX_NAME}"
    if (path / "config.json").is_file():
        named = read_json(path / "config.json").get("_class_name")
        return (
            f"{path} is the folder of one component ({named or 'its config.json names no class'}) "
            f"and holds no {INDEX_NAME}; give the folder of the whole pipeline, with scheduler, "
            "text encoders and autoencoder"
        )
    inside = sorted(p.parent.name for p in path.glob(f"*/{INDEX_NAME}"))
    hint = f"; {inside[0]!r} inside it does" if inside else ""
    return f"{path} holds no {INDEX_NAME}; give the folder of a whole pipeline{hint}"


def wrap_pipeline(pipeline: Any, null_class: int | None = None, scheduler: Any = None) -> Any:
    """Give a class-conditional `UNet2DModel` the pipeline that can call it; others stay.

    Those that stay are also pipelines of another kind, whose sampler is their own.

    Args:
        pipeline: any.
        null_class: the label that stands for "no class".
        scheduler: to draw with, where the pipeline has put another in its place; None: the pipeline's.

    Raises:
        ArtefactError: the model does not know the label.
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
def open_pipeline(model: str | Path | Any) -> LoadedPipeline:
    """Load a pipeline in float32, from safetensors only; every tensor is checked.

    Args:
        model: a diffusers folder, the name of a shipped model, a hub id, or a pipeline object. An
            object is not changed: its models are built again, see `trtq.diffusion.prepared`.

    Raises:
        ArtefactError: it cannot be found or read, or its weights do not fit.
        QuantizationError: it has no denoiser, or weights that are no finite numbers.
        UsageError: its denoiser needs inputs that trtq does not pass, or the object was changed in a way
            that would be lost.
    """
    if not isinstance(model, str | Path):
        return _opened_object(model)
    place = resolve_model(model)
    folder = place if isinstance(place, Path) else None
    pipeline = load_pipeline(folder if folder is not None else _downloaded(str(place)))
    name = find_denoiser(pipeline)
    pipeline = wrap_pipeline(pipeline, read_null_class(folder) if folder is not None else None)
    pipeline.set_progress_bar_config(disable=True)
    check_needs(pipeline, name, str(model))
    return LoadedPipeline(str(model), folder, pipeline, name)


def _opened_object(pipeline: Any) -> LoadedPipeline:
    """A pipeline object; one that trtq itself has made low-bit stays as it is."""
    if isinstance(pipeline, nn.Module):
        raise UsageError(
            f"a whole pipeline is needed, got the model {type(pipeline).__name__} alone; put it "
            "into one, or give the pipeline's folder"
        )
    name = find_denoiser(pipeline)
    if not isinstance(getattr(pipeline, name), StandIn):
        # Before it is built again as well: what an adapter has added makes no plain model.
        check_inputs(pipeline)
        pipeline = wrap_pipeline(plain_pipeline(pipeline))
        check_needs(pipeline, name, type(pipeline).__name__)
    return LoadedPipeline(type(pipeline).__name__, None, pipeline, name)


def _downloaded(name: str) -> Path:
    """The folder of a hub id, in the hub's own cache.

    Raises:
        ArtefactError: there is no such repository, or it cannot be reached.
    """
    from diffusers import DiffusionPipeline

    try:
        with quiet_diffusers():
            found = DiffusionPipeline.download(name, use_safetensors=True)
    # The hub's client and diffusers raise what their network libraries do.
    except Exception as err:
        raise ArtefactError(
            f"cannot load the pipeline {name!r} from the hub ({one_line(err)}); check the name and "
            "the connection, or download it (`hf download`) and give its folder"
        ) from err
    return Path(found)
