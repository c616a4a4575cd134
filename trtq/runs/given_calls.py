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
from trtq.diffusion.layout import CONFIG_NAME, read_index, read_json
from trtq.diffusion.loading import resolve_model
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import general_prompts, read_lines
from trtq.diffusion.scheduler_rules import KNOWN_SCHEDULERS
from trtq.diffusion.stepping import KNOWN_PIPELINES, stepping_of
from trtq.errors import ArtefactError, UsageError

__all__ = ["calibration_prompts", "knows_pipeline", "named_files", "user_calls"]


def knows_pipeline(model: Any) -> bool:
    """Whether trtq knows a pipeline's noise levels and inputs in closed form, without recording.

    Args:
        model: a checkpoint, see `trtq.runs.quantize.quantize`; one that cannot be read counts as known.
    """
    place = model.place if isinstance(model, Opened) else model
    if not isinstance(place, str | Path):
        if isinstance(place, nn.Module):
            return True
        scheduler = type(getattr(place, "scheduler", None)).__name__
        config = getattr(getattr(place, "unet", None), "config", {})
        return stepping_of(place) is not None and _known_parts(scheduler, config)
    try:
        folder = resolve_model(place)
        if not isinstance(folder, Path) or not folder.is_dir():
            return True
        index = read_index(folder)
        scheduler = str((index.get("scheduler") or [None, None])[1])
        path = folder / "unet" / CONFIG_NAME
        config = read_json(path) if path.is_file() else {}
    except ArtefactError:
        return True
    return str(index["_class_name"]) in KNOWN_PIPELINES and _known_parts(scheduler, config)


def _known_parts(scheduler: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler is known, and a UNet takes no inputs that only its pipeline can make."""
    further = config.get("time_cond_proj_dim"), config.get("encoder_hid_dim_type")
    return (
        scheduler in KNOWN_SCHEDULERS and further[0] is None and further[1] in (None, "text_proj")
    )


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
    offered: dict[str, Any] = {
        STEPS_ARGUMENT: recipe.steps,
        "guidance_scale": recipe.guidance,
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
