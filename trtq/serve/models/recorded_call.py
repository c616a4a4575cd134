"""What requests may change of a recorded call, and the call that a request makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from trtq.artefact.opened import DEFAULT_STEPS, GraphFolder, Opened
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.user_call import STEPS_ARGUMENT, UserCall, accepted_arguments
from trtq.checkpoint.layout import class_names
from trtq.diffusion.encode import class_count
from trtq.errors import UsageError
from trtq.serve.models.base import GenerationRequest, ModelInfo, Sizes, class_label

__all__ = ["base_call", "describe_recorded", "request_call"]

_GUIDANCE = "guidance_scale"
_IMAGE, _MASK = "image", "mask_image"
_CHOSEN_STEPS = ("timesteps", "sigmas")
"""Arguments that fix the timesteps of a call, so that its number of steps cannot change."""
_DEFAULT_MAX_STEPS = 1000


def base_call(source: RecordedPipeline) -> UserCall:
    """The recorded call, with images as its result."""
    accepted = accepted_arguments(source.pipeline)
    arguments: dict[str, Any] = {"output_type": "pil"} if "output_type" in accepted else {}
    if "return_dict" in source.call.arguments:
        arguments["return_dict"] = True
    return source.call.updated(arguments)


def describe_recorded(
    source: RecordedPipeline,
    name: str,
    provider: str,
    artefact: Opened,
    image_size: tuple[int, int],
) -> ModelInfo:
    """The description of a recorded pipeline.

    Args:
        source: the pipeline with the recorded call.
        name: model name used in requests.
        provider: execution provider.
        artefact: the opened artefact.
        image_size: height and width of the images of the recorded call, in pixels.
    """
    accepted = accepted_arguments(source.pipeline)
    given = source.call.arguments
    kind = _kind(source, accepted)
    classes = class_count(source.pipeline) if kind == "class" else None
    guidance = _value(given, accepted, _GUIDANCE)
    takes_guidance = _GUIDANCE in accepted
    takes_size = {"height", "width"} <= accepted.keys()
    fixed = next((given[key] for key in _CHOSEN_STEPS if given.get(key) is not None), None)
    steps = _value(given, accepted, STEPS_ARGUMENT) if fixed is None else len(fixed)
    return ModelInfo(
        name=name,
        kind=kind,
        classes=() if classes is None else tuple(class_names(source.folder, classes)),
        image_size=image_size,
        steps=int(steps or artefact.steps or DEFAULT_STEPS),
        max_steps=_max_steps(source.pipeline),
        guidance=float(guidance) if takes_guidance and guidance is not None else 1.0,
        takes_guidance=takes_guidance,
        provider=provider,
        bits=artefact.bits if artefact.low_bit else None,
        sizes=_sizes(source, artefact, image_size) if takes_size or _IMAGE in accepted else None,
        takes_negative_prompt="negative_prompt" in accepted,
        batching="request",
        takes_steps=STEPS_ARGUMENT in accepted and fixed is None,
        takes_image=_IMAGE in accepted,
        needs_image=_is_needed(given, accepted, _IMAGE),
        takes_mask=_MASK in accepted,
        needs_mask=_is_needed(given, accepted, _MASK),
        follows_image=_IMAGE in accepted and not takes_size,
    )


def request_call(
    source: RecordedPipeline, call: UserCall, info: ModelInfo, request: GenerationRequest
) -> UserCall:
    """The call that a request makes: the recorded call with the values that the request changes.

    Args:
        source: the pipeline with the recorded call.
        call: the recorded call, see `base_call`.
        info: description of the model.
        request: the request, checked against `info`.

    Raises:
        UsageError: the model does not accept the prompt.
    """
    accepted = accepted_arguments(source.pipeline)
    given = call.arguments
    if info.kind == "text":
        call = call.updated(_texts("prompt", request.prompt, given))
        if request.negative_prompt is not None:
            call = call.updated(_texts("negative_prompt", request.negative_prompt, given))
    elif info.kind == "class":
        labels = given.get("class_labels")
        count = len(labels) if isinstance(labels, list) else 1
        call = call.updated({"class_labels": count * [class_label(info, request.prompt)]})
    elif request.prompt.strip():
        raise UsageError(f"{info.name} takes no prompt; leave it empty")
    changes: dict[str, Any] = {}
    if info.takes_steps:
        changes[STEPS_ARGUMENT] = request.steps
    if info.takes_guidance:
        changes[_GUIDANCE] = request.guidance
    if request.size is not None and request.size != info.image_size and not info.follows_image:
        changes |= {"height": request.size[0], "width": request.size[1]}
    # A value that the recorded call has already is not passed again: the call stays as it was recorded.
    changes = {
        key: value for key, value in changes.items() if value != _value(given, accepted, key)
    }
    if request.images:
        several = isinstance(given.get(_IMAGE), list)
        changes[_IMAGE] = list(request.images) if several else _single(request.images, info.name)
    if request.mask is not None:
        changes[_MASK] = request.mask
    return call.updated(changes)


def _kind(
    source: RecordedPipeline, accepted: Mapping[str, inspect.Parameter]
) -> Literal["class", "text", "none"]:
    if "class_labels" in accepted and class_count(source.pipeline) is not None:
        return "class"
    # A call with the embedding of its prompt keeps this prompt.
    has_text = "prompt" in accepted and source.call.arguments.get("prompt_embeds") is None
    return "text" if has_text else "none"


def _value(
    given: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter], name: str
) -> Any | None:
    """The value of an argument in the recorded call, else its default."""
    if name in given or name not in accepted:
        return given.get(name)
    default = accepted[name].default
    return None if default is inspect.Parameter.empty else default


def _is_needed(
    given: Mapping[str, Any], accepted: Mapping[str, inspect.Parameter], name: str
) -> bool:
    """Whether an image was recorded, or has no default; another user's image is never used instead."""
    if name not in accepted:
        return False
    return given.get(name) is not None or accepted[name].default is inspect.Parameter.empty


def _max_steps(pipeline: Any) -> int:
    """Length of the noise schedule."""
    config = getattr(getattr(pipeline, "scheduler", None), "config", {})
    steps = config.get("num_train_timesteps")
    return steps if isinstance(steps, int) and steps > 0 else _DEFAULT_MAX_STEPS


def _sizes(source: RecordedPipeline, artefact: Opened, size: tuple[int, int]) -> Sizes | None:
    """The sizes of images: those that the graph was exported for; in torch up to twice the default.

    The result is None if the graph has one size.
    """
    multiple_of = source.cell_pixels
    if hasattr(source.denoiser.config, "patch_size") or hasattr(
        source.denoiser.config, "block_out_channels"
    ):
        multiple_of *= source.coarsest
    if isinstance(artefact, GraphFolder):
        low, _, high = (artefact.size or "").partition(":")
        return Sizes(_pair(low), _pair(high), multiple_of) if high else None
    height, width = size
    return Sizes((multiple_of, multiple_of), (2 * height, 2 * width), multiple_of)


def _pair(size: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` -> (height, width)."""
    height, _, width = size.partition("x")
    return int(height), int(width)


def _texts(name: str, text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """An argument with a text, in as many copies as the recorded call has texts."""
    recorded = given.get(name, given.get("prompt"))
    return {name: len(recorded) * [text] if isinstance(recorded, list) else text}


def _single(images: tuple[Any, ...], name: str) -> Any:
    if len(images) > 1:
        raise UsageError(f"{name} takes one image, got {len(images)}")
    return images[0]
