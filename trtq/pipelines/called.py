"""Pipelines that are used through their own call, and the calls that a user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.artefact.opened import DEFAULT_STEPS, Checkpoint, Opened, StoredArtefact, open_artefact
from trtq.calls.arguments import nearest_text
from trtq.calls.describe import CallDescription, describe_call
from trtq.calls.files import as_call
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.calls.user_call import (
    STEPS_ARGUMENT,
    UserCall,
    accepted_arguments,
    check_names,
    default_call,
)
from trtq.checkpoint.component_classes import pipeline_class
from trtq.checkpoint.layout import parse_size, read_index
from trtq.checkpoint.resolve import resolve_model
from trtq.diffusion.loading import open_pipeline
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.prompts import general_prompts, recommended_guidance
from trtq.errors import UsageError
from trtq.pipelines.open import TORCH, open_any
from trtq.runs.given_calls import knows_pipeline

__all__ = ["CallOptions", "call_for", "is_called", "open_called", "show_call", "steps_of"]

_CHOSEN_STEPS = ("timesteps", "sigmas")


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """Options of a command that change arguments of a pipeline's call; None: unchanged.

    Attributes:
        prompt: prompt.
        negative_prompt: text that guidance steers away from.
        steps: number of denoising steps.
        guidance: classifier-free guidance scale.
        size: `HEIGHTxWIDTH` in pixels.
        class_label: class of the images.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: str | None = None
    class_label: int | None = None

    def arguments(self) -> dict[str, tuple[str, Any]]:
        """Name of the option and value, by name of the argument."""
        values: dict[str, tuple[str, Any]] = {
            "prompt": ("--prompt", self.prompt),
            "negative_prompt": ("--negative-prompt", self.negative_prompt),
            STEPS_ARGUMENT: ("--steps", self.steps),
            "guidance_scale": ("--guidance", self.guidance),
        }
        if self.class_label is not None:
            values["class_labels"] = ("--class-label", [self.class_label])
        if self.size is not None:
            height, width = parse_size(self.size)
            values |= {"height": ("--size", height), "width": ("--size", width)}
        return {name: pair for name, pair in values.items() if pair[1] is not None}


def is_called(opened: Opened, *, call: bool = False) -> bool:
    """Whether an artefact is used through its pipeline's own call.

    Args:
        opened: the artefact or checkpoint.
        call: whether the user gives arguments of the call.
    """
    if isinstance(opened, StoredArtefact):
        return call or opened.manifest.recorded is not None
    return call or not knows_pipeline(opened)


def open_called(
    artefact: str | Path | Opened | Any, provider: str | None = None
) -> tuple[LoadedPipeline, UserCall | None]:
    """Open an artefact or a checkpoint to use it through its pipeline's own call.

    Args:
        artefact: see `trtq.pipelines.open.open_any`.
        provider: see `trtq.pipelines.open.open_any`.

    Returns:
        The pipeline, and the recorded call; None: nothing was recorded.
    """
    opened = open_artefact(artefact, verify=False)
    if isinstance(opened, Checkpoint) and provider in (None, TORCH) and not knows_pipeline(opened):
        return open_pipeline(opened.place, opened.config, recorded=True), None
    source = open_any(opened, provider)
    return source, source.call if isinstance(source, RecordedPipeline) else None


def call_for(
    source: LoadedPipeline,
    recorded: UserCall | None,
    options: CallOptions,
    call: str | Path | Mapping[str, Any] | UserCall | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> UserCall:
    """The call that a user asks for: the recorded or a default one, with the user's changes.

    Args:
        source: the pipeline.
        recorded: the recorded call; None: trtq chooses a prompt and the number of steps.
        options: options of the command; they take precedence.
        call: arguments of the call: a TOML file, a dict or a `UserCall`.
        inputs: further arguments, which take precedence over those of `call`.

    Raises:
        UsageError: the pipeline does not take an argument or option, or requires one that is missing.
    """
    accepted = accepted_arguments(source.pipeline)
    changes = {**as_call(call).arguments, **(inputs or {})}
    for name, (option, value) in options.arguments().items():
        if name not in accepted:
            known = [key for key in accepted if key != "generator"]
            raise UsageError(
                f"{type(source.pipeline).__name__} takes no {name}{nearest_text(name, known)}, so "
                f"{option} has no effect; trtq generate {source.name} --show-call lists what it takes"
            )
        changes[name] = value
    if recorded is None:
        check_names(source.pipeline, changes)
        return _default(source, changes)
    base = recorded
    if options.steps is not None:
        kept = {k: v for k, v in base.arguments.items() if k not in _CHOSEN_STEPS}
        base = UserCall(kept)
    chosen = base.updated(changes)
    chosen.check(source.pipeline)
    return chosen


def _default(source: LoadedPipeline, changes: Mapping[str, Any]) -> UserCall:
    """A call without a recording: the user's arguments, a prompt and the number of steps."""
    prompts = source.prompts if source.prompts is not None else general_prompts()
    offered: dict[str, Any] = dict(changes)
    if not any(name in changes for name in _CHOSEN_STEPS):
        offered.setdefault(STEPS_ARGUMENT, DEFAULT_STEPS)
    offered.setdefault("guidance_scale", recommended_guidance(source.prompts, source.classes))
    if source.classes is not None:
        offered.setdefault("class_labels", [0])
    return default_call(source.pipeline, tuple(prompts.calibration), offered)


def steps_of(pipeline: Any, call: UserCall) -> int | None:
    """Number of denoising steps of a call; None if neither the call nor the signature gives one."""
    if call.steps is not None:
        return call.steps
    for name in _CHOSEN_STEPS:
        if isinstance(call.arguments.get(name), list | tuple):
            return len(call.arguments[name])
    parameter = accepted_arguments(pipeline).get(STEPS_ARGUMENT)
    default = None if parameter is None else parameter.default
    return default if isinstance(default, int) else None


def show_call(artefact: str | Path | Opened | Any) -> CallDescription:
    """Describe what the pipeline's call of an artefact or a checkpoint takes.

    Args:
        artefact: see `trtq.pipelines.open.open_any`.

    Returns:
        The arguments, with their values in the recorded call if there is one.

    Raises:
        ArtefactError: the artefact or checkpoint cannot be read.
    """
    opened = open_artefact(artefact)
    # The weights of a recorded artefact and of an unknown pipeline's folder are not read.
    if isinstance(opened, StoredArtefact) and opened.manifest.recorded is not None:
        call = load_call(opened.folder / CALL_FOLDER)
        return describe_call(pipeline_class(opened.folder, read_index(opened.folder)), call)
    if isinstance(opened.place, str | Path) and not isinstance(opened, StoredArtefact):
        folder = resolve_model(opened.place)
        if isinstance(folder, Path) and folder.is_dir() and not knows_pipeline(opened):
            return describe_call(pipeline_class(folder, read_index(folder)))
    source, recorded = open_called(opened)
    return describe_call(type(source.pipeline), recorded)
