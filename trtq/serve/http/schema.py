"""What requests for images may say: OpenAI's fields, and the few that diffusion needs beside them."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtq.serve.http.errors import ApiError, printable
from trtq.serve.models.base import ModelInfo
from trtq.serve.service import Limits

__all__ = ["ImageRequest", "check_against", "guidance_of", "parse_request", "size_of"]

_SIZE = re.compile("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

_MEANT = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_images": "n",
    "timeout": "deadline",
}
_UNSUPPORTED = ("input_fidelity", "moderation", "output_compression", "style")
"""OpenAI's, with nothing here that they could mean."""
_REASONS = {
    "response_format": "this server keeps no files, so pictures come as 'b64_json'",
    "output_format": "pictures come as 'png'",
    "quality": "there is one quality, 'auto'",
    "background": "pictures are 'opaque'",
}


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(max_length=4000, description="A text, or the name or number of a class.")
    negative_prompt: str | None = Field(
        None, max_length=4000, description="What is not to be shown; needs guidance other than 1."
    )
    model: str | None = Field(None, description="By default the server's first model.")
    n: int = Field(
        1, ge=1, description="Number of images.", json_schema_extra={"type": ["integer", "null"]}
    )
    size: str | None = Field(None, description="WIDTHxHEIGHT, or 'auto': the model's own size.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, max_length=256, description="Taken and not used.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: pictures of an image before it is done."
    )
    progress: bool | None = Field(None, description="With stream: an event after each step.")
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Image i of a seed is the same in every request."
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance: float | None = Field(
        None, ge=0, le=30, allow_inf_nan=False, description="Up to 1 is none."
    )
    deadline: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="Seconds that the answer may take."
    )


def parse_request(body: bytes) -> ImageRequest:
    """The request in a body; a field that is null is one that was left out, as OpenAI has it.

    Raises:
        ApiError: 400, with the name of the field.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise ApiError(400, "invalid_json", f"the body is no JSON: {str(err)[:200]}") from err
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    for name, value in found.items():
        if not (_is_text(name) and _is_text(value)):
            shown = printable(name)
            raise ApiError(
                400, "invalid_value", f"{shown!r} holds characters that are no text", param=shown
            )
    given = {
        name: value for name, value in found.items() if value is not None or not _optional(name)
    }
    try:
        return ImageRequest.model_validate(given)
    except ValidationError as err:
        raise _explain(err, found) from err


def _optional(name: str) -> bool:
    """Whether a request may leave a field out that is known here, or to OpenAI."""
    field = ImageRequest.model_fields.get(name)
    return name in _UNSUPPORTED if field is None else not field.is_required()


def _is_text(value: Any) -> bool:
    """Whether a string can be written at all, and holds nothing that ends strings elsewhere."""
    if not isinstance(value, str):
        return True
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _explain(error: ValidationError, found: dict[str, Any]) -> ApiError:
    """The first thing that is wrong, by the name of its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    shown = printable(name)
    if first["type"] == "extra_forbidden":
        fields = list(ImageRequest.model_fields)
        if name in _UNSUPPORTED:
            message = f"this server does not support {shown!r}; leave it out"
            return ApiError(400, "unsupported_parameter", message, param=shown)
        near = _MEANT.get(name) or next(iter(difflib.get_close_matches(shown, fields, 1)), None)
        hint = f"did you mean {near!r}?" if near else f"known are {', '.join(fields)}"
        return ApiError(400, "unknown_parameter", f"unknown field {shown!r}; {hint}", param=shown)
    if first["type"] == "missing":
        return ApiError(400, "missing_parameter", f"the field {shown!r} is missing", param=shown)
    message = _REASONS.get(name, first["msg"][:1].lower() + first["msg"][1:])
    given = printable(repr(found[name]))
    return ApiError(400, "invalid_value", f"{shown!r} cannot be {given}: {message}", param=shown)


def guidance_of(request: ImageRequest, info: ModelInfo) -> float:
    """The guidance that a request asks for, or the model's own; 1 is none, and so is less."""
    return info.guidance if request.guidance is None else max(1.0, request.guidance)


def size_of(request: ImageRequest, info: ModelInfo) -> tuple[int, int] | None:
    """Height and width that a request asks for, or the model's own; None if that is no size."""
    if request.size in (None, "auto"):
        return info.image_size
    found = _SIZE.fullmatch(request.size or "")
    return found and (int(found[2]), int(found[1]))


def check_against(request: ImageRequest, info: ModelInfo, limits: Limits) -> None:
    """Nothing, if this model on this server draws what is asked for.

    Raises:
        ApiError: 400, with the name of the field.
    """

    def refuse(param: str, message: str) -> ApiError:
        return ApiError(400, "invalid_value", message, param=param)

    if request.n > limits.max_images:
        raise refuse("n", f"n={request.n} is too many; this server draws up to {limits.max_images}")
    if request.steps is not None and request.steps > info.max_steps:
        raise refuse("steps", f"steps={request.steps} is too many; choose 1 .. {info.max_steps}")
    size = size_of(request, info)
    if size != info.image_size and not (size and info.sizes and size in info.sizes):
        height, width = info.image_size
        raise refuse(
            "size",
            f"{info.name} draws {info.sizes or f'WIDTHxHEIGHT {width}x{height}'}, got "
            f"{str(request.size)[:40]!r}; or say 'auto' for {width}x{height}",
        )
    if guidance_of(request, info) != 1 and not info.takes_guidance:
        raise refuse("guidance", f"{info.name} takes no guidance; it must be 1")
    if request.negative_prompt:
        if not info.takes_negative_prompt:
            raise refuse("negative_prompt", f"{info.name} takes no negative prompt; leave it out")
        if guidance_of(request, info) == 1:
            raise refuse(
                "negative_prompt",
                "a negative prompt changes nothing at guidance 1; choose another, or leave it out",
            )
    for name in ("partial_images", "progress"):
        if getattr(request, name) and not request.stream:
            raise refuse(name, f'{name!r} needs "stream": true')
