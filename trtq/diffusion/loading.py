"""Opening a pipeline: from a folder, a shipped model, a hub id or a pipeline object."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from trtq.checkpoint.components import find_denoiser, unwrapped
from trtq.checkpoint.layout import check_null_class, read_null_class
from trtq.checkpoint.pipeline_folder import load_pipeline
from trtq.checkpoint.places import config_folder, download
from trtq.checkpoint.prepared import plain_pipeline
from trtq.checkpoint.resolve import resolve_model
from trtq.checkpoint.single_file import load_single_file
from trtq.checkpoint.weight_files import single_file
from trtq.checkpoint.wording import one_line
from trtq.diffusion.closed_form import check_inputs, check_needs
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS, scheduler_name
from trtq.errors import UsageError
from trtq.quant.stand_in import StandIn
from trtq.torch_settings import with_own_settings

__all__ = ["open_pipeline", "wrap_pipeline"]


def wrap_pipeline(pipeline: Any, null_class: int | None = None, scheduler: Any = None) -> Any:
    """Put a class-conditional `UNet2DModel` into a pipeline that passes class labels.

    Pipelines without such a UNet, pipelines with their own sampler and those of other libraries are
    returned unchanged.

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
    chosen = pipeline.scheduler if scheduler is None else scheduler
    outside = not type(pipeline).__module__.startswith("diffusers.")
    labelled = "class_labels" in inspect.signature(type(pipeline).__call__).parameters
    # Other schedulers belong to a sampler of their pipeline.
    if (
        set(pipeline.components) != {"unet", "scheduler"}
        or labelled
        or outside
        or scheduler_name(chosen) not in KNOWN_SCHEDULERS
    ):
        return pipeline
    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    check_null_class(null_class, int(unet.config.num_class_embeds))
    wrapped = ClassConditionalPipeline(unet, chosen, null_class)
    wrapped.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return wrapped


@with_own_settings
def open_pipeline(
    model: str | Path | Any,
    config: str | Path | None = None,
    *,
    recorded: bool = False,
    stored: bool = False,
) -> LoadedPipeline:
    """Load a pipeline in float32, from safetensors only, with all tensors checked.

    Args:
        model: diffusers folder, single-file checkpoint (`.safetensors`), name of a shipped model, hub
            id, or pipeline object. An object is not changed: its models are built again, see
            `trtq.checkpoint.prepared`.
        config: folder or hub id of a pipeline of the architecture of a single-file checkpoint; None: the
            hub id that diffusers infers from the file.
        recorded: whether the caller records the pipeline's own call. The denoiser of such a pipeline may
            need any input.
        stored: whether large weights of a folder stay in their files or in half precision until they
            are used, see `trtq.checkpoint.stored_models`.

    Raises:
        ArtefactError: the model is missing or cannot be read, or its weights do not fit.
        QuantizationError: the pipeline has no denoiser, or a weight is not a finite number.
        UsageError: the denoiser needs inputs that trtq does not pass, or the object has a change that
            would be lost by rebuilding, or `config` is given for another kind of model.
    """
    file = single_file(model)
    if config is not None and file is None:
        what = str(model) if isinstance(model, str | Path) else f"a {type(model).__name__}"
        raise UsageError(
            f"--config (config=...) configures a single-file checkpoint (.safetensors), but the model "
            f"is {one_line(what)}; leave it out, or give the file"
        )
    if file is None and not isinstance(model, str | Path):
        return _open_object(model, recorded=recorded)
    folder: Path | None = None
    if file is not None:
        labels = config_folder(file, config)
        pipeline = load_single_file(file, labels)
    else:
        place = resolve_model(model)
        folder = place if isinstance(place, Path) else None
        labels = folder if folder is not None else download(str(place))
        pipeline = load_pipeline(labels, stored=stored)
    name = find_denoiser(pipeline)
    pipeline = wrap_pipeline(pipeline, read_null_class(labels))
    if not recorded:
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
            pipeline = wrap_pipeline(plain_pipeline(pipeline))
        else:
            # Check before rebuilding, too: settings that an adapter added do not fit a plain model.
            model = unwrapped(getattr(pipeline, name))
            check_inputs(model, f"the {name} of {type(pipeline).__name__}")
            pipeline = wrap_pipeline(plain_pipeline(pipeline))
            check_needs(pipeline, name, type(pipeline).__name__)
    return LoadedPipeline(type(pipeline).__name__, None, pipeline, name)
