"""The calls that the user gives, or a default call, and whether a pipeline needs to be recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from trtq.artefact.opened import Opened
from trtq.calib.recipe import Recipe
from trtq.calls.user_call import (
    STEPS_ARGUMENT,
    UserCall,
    accepted_arguments,
    check_names,
    default_call,
)
from trtq.checkpoint.component_classes import pipeline_class
from trtq.checkpoint.components import AUTOENCODERS, find_denoiser
from trtq.checkpoint.layout import CONFIG_NAME, read_index, read_json
from trtq.checkpoint.resolve import resolve_model
from trtq.diffusion.closed_form import recording_reason
from trtq.diffusion.folder import denoiser_in
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import general_prompts, read_lines, recommended_guidance
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS, scheduler_name
from trtq.errors import ArtefactError, QuantizationError, UsageError

__all__ = [
    "calibration_prompts",
    "knows_pipeline",
    "named_files",
    "runs_in_call",
    "user_calls",
]


def knows_pipeline(model: Any) -> bool:
    """Whether trtq knows a pipeline's noise levels and inputs in closed form, without recording.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`; one that cannot be read counts as known.
    """
    place = model.place if isinstance(model, Opened) else model
    if not isinstance(place, str | Path):
        return isinstance(place, nn.Module) or _knows_object(place)
    try:
        folder = resolve_model(place)
        if not isinstance(folder, Path) or not folder.is_dir():
            return True
        return _knows_folder(folder)
    except ArtefactError:
        return True


def runs_in_call(
    model: Any,
    calls: Sequence[Mapping[str, Any]] | None,
    inputs: Mapping[str, Any] | None,
    *,
    stored: bool,
) -> bool:
    """Whether a model is calibrated inside its pipeline's own call.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`.
        calls: arguments of the user's calls; None: none were given.
        inputs: further arguments of every call.
        stored: whether large weights stay in their files.
    """
    return stored or calls is not None or bool(inputs) or not knows_pipeline(model)


def _knows_object(pipeline: Any) -> bool:
    try:
        source = LoadedPipeline(type(pipeline).__name__, None, pipeline, find_denoiser(pipeline))
    except QuantizationError:
        return True
    scheduler = scheduler_name(getattr(pipeline, "scheduler", None))
    return source.recording_reason is None and scheduler in KNOWN_SCHEDULERS


def _knows_folder(folder: Path) -> bool:
    index = read_index(folder)
    denoiser = denoiser_in(folder)

    def config(part: str) -> Mapping[str, Any]:
        path = folder / part / CONFIG_NAME
        return read_json(path) if path.is_file() else {}

    scheduler, model_class = (
        str((index.get(part) or [None, None])[1]) for part in ("scheduler", denoiser)
    )
    autoencoder = next((config(name) for name in AUTOENCODERS if name in index), {})
    cls = pipeline_class(folder, index)
    reason = recording_reason(cls, model_class, config(denoiser), autoencoder)
    return reason is None and scheduler in KNOWN_SCHEDULERS


def user_calls(
    source: LoadedPipeline,
    calls: Sequence[Mapping[str, Any]] = (),
    recipe: Recipe | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> list[UserCall]:
    """The user's calls, checked and with a number of steps.

    Args:
        source: the loaded checkpoint.
        calls: arguments of the user's calls; none: a default call.
        recipe: recipe with the steps, prompts and size of a default call; None: the defaults.
        inputs: further arguments of every call, also of a default call.

    Raises:
        UsageError: an argument does not exist, or the pipeline requires one that trtq cannot choose.
    """
    chosen = Recipe(method="minmax") if recipe is None else recipe
    further = dict(inputs or {})
    given = [UserCall({**arguments, **further}) for arguments in calls]
    for call in given:
        call.check(source.pipeline)
    if not given:
        check_names(source.pipeline, further)
        offered = {**_offered(source, chosen), **further}
        given = [default_call(source.pipeline, calibration_prompts(source, chosen), offered)]
    return [_with_steps(call, chosen) for call in given]


_FILE_ARGUMENTS = ("image", "mask", "video", "audio")
"""Parts of the names of arguments that are files."""


@contextmanager
def named_files(pipeline: Any, *, default: bool) -> Iterator[None]:
    """Inside the block, an error of a default call names the files that the pipeline takes.

    Args:
        pipeline: diffusers pipeline.
        default: whether the call is a default call.

    Raises:
        UsageError: the pipeline cannot be called with the default call, and takes files.
    """
    try:
        yield
    except ArtefactError as err:
        files = [
            name
            for name in accepted_arguments(pipeline)
            if any(part in name for part in _FILE_ARGUMENTS) and "num" not in name
        ]
        if not default or not files:
            raise
        options = " ".join(f"--input {name}=FILE" for name in files)
        raise UsageError(
            f"{err}; give what the pipeline needs of {options}, or --call FILE.toml"
        ) from err


def calibration_prompts(source: LoadedPipeline, recipe: Recipe) -> tuple[str, ...]:
    """The user's prompts, else those of the model, else general ones."""
    if recipe.prompts is not None:
        return read_lines(Path(recipe.prompts))
    chosen = source.prompts if source.prompts is not None else general_prompts()
    return tuple(chosen.calibration)


def _offered(source: LoadedPipeline, recipe: Recipe) -> dict[str, Any]:
    """Arguments that a default call passes if the pipeline takes them."""
    guidance = recipe.guidance
    if guidance is None:
        guidance = recommended_guidance(source.prompts, source.classes)
    offered: dict[str, Any] = {
        STEPS_ARGUMENT: recipe.steps,
        "guidance_scale": guidance,
        "class_labels": [0] if source.classes is not None else None,
    }
    if recipe.size is not None:
        height, _, width = recipe.size.partition("x")
        offered |= {"height": int(height), "width": int(width)}
    return offered


def _with_steps(call: UserCall, recipe: Recipe) -> UserCall:
    """The call with a number of steps, unless the user chose timesteps or noise levels."""
    chosen = {"timesteps", "sigmas", STEPS_ARGUMENT}
    if any(call.arguments.get(name) is not None for name in chosen):
        return call
    return call.updated({STEPS_ARGUMENT: recipe.steps})
