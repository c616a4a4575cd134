"""The fields of an image request: OpenAI's, and a few more for diffusion models."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtq.serve.http.errors import ApiError, printable
from trtq.serve.models.base import ModelInfo
from trtq.serve.options import Limits

__all__ = ["ImageRequest", "check_against", "guidance_of", "parse_request", "size_of", "validate"]

_SIZE = re.compile("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

_SYNONYMS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_images": "n",
    "timeout": "deadline",
}
_UNSUPPORTED = ("input_fidelity", "moderation", "output_compression", "style")
"""OpenAI's fields that this server does not support."""
_REASONS = {
    "response_format": "this server stores no files; use 'b64_json'",
    "output_format": "images are encoded as 'png'",
    "quality": "the only quality is 'auto'",
    "background": "pictures are 'opaque'",
}


class ImageRequest(BaseModel):
    """The fields of `POST /v1/images/generations` and, with files, of `POST /v1/images/edits`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(max_length=4000, description="A text, or the name or number of a class.")
    negative_prompt: str | None = Field(
        None,
        max_length=4000,
        description="What the images must not show; requires guidance greater than 1.",
    )
    model: str | None = Field(None, description="Model name. Default: the server's first model.")
    n: int = Field(
        1, ge=1, description="Number of images.", json_schema_extra={"type": ["integer", "null"]}
    )
    size: str | None = Field(
        None,
        description="Image size in pixels as WIDTHxHEIGHT, width first as in OpenAI's API (the option "
        "--size of the command line is HEIGHTxWIDTH), or 'auto': the model's default size.",
    )
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, max_length=256, description="Accepted and ignored.")
    stream: bool | None = Field(None, description="Whether to respond with server-sent events.")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=3,
        description="Number of previews per image before it is complete; requires stream.",
    )
    progress: bool | None = Field(
        None, description="Whether to send an event after each denoising step; requires stream."
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="Seed of the initial noise; image i of a seed is the same in every request. "
        "Default: a random seed.",
    )
    steps: int | None = Field(None, ge=1, description="Number of denoising steps.")
    guidance: float | None = Field(
        None,
        ge=0,
        le=30,
        allow_inf_nan=False,
        description="Classifier-free guidance scale; 1 or less disables it.",
    )
    deadline: float | None = Field(
        None,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="Maximum time until the response is complete, in seconds.",
    )


def parse_request(body: bytes) -> ImageRequest:
    """Parse the body of a request; a null field counts as missing, as in OpenAI's API.

    Raises:
        ApiError: 400, with the name of the invalid field.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {str(err)[:200]}") from err
    if not isinstance(document, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return validate(document)


def validate(document: dict[str, Any]) -> ImageRequest:
    """Check the fields of a request; a null field counts as missing.

    Args:
        document: values by name.

    Raises:
        ApiError: 400, with the name of the invalid field.
    """
    for name, value in document.items():
        if not (_is_text(name) and _is_text(value)):
            shown = printable(name)
            raise ApiError(
                400,
                "invalid_value",
                f"{shown!r} contains characters that are not text",
                param=shown,
            )
    fields = {
        name: value for name, value in document.items() if value is not None or not _optional(name)
    }
    try:
        return ImageRequest.model_validate(fields)
    except ValidationError as err:
        raise _explain(err, document) from err


def _optional(name: str) -> bool:
    """Whether this is an optional field of a request, defined by this server or by OpenAI."""
    field = ImageRequest.model_fields.get(name)
    return name in _UNSUPPORTED if field is None else not field.is_required()


def _is_text(value: Any) -> bool:
    """Whether a string is valid Unicode without NUL; true for values of other types."""
    if not isinstance(value, str):
        return True
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _explain(error: ValidationError, document: dict[str, Any]) -> ApiError:
    """The first error, with the name of its field.

    Args:
        error: the errors that pydantic reports.
        document: the body of the request.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    shown = printable(name)
    if first["type"] == "extra_forbidden":
        fields = list(ImageRequest.model_fields)
        if name in _UNSUPPORTED:
            message = f"this server does not support {shown!r}; leave it out"
            return ApiError(400, "unsupported_parameter", message, param=shown)
        near = _SYNONYMS.get(name) or next(iter(difflib.get_close_matches(shown, fields, 1)), None)
        hint = f"did you mean {near!r}?" if near else f"known fields are {', '.join(fields)}"
        return ApiError(400, "unknown_parameter", f"unknown field {shown!r}; {hint}", param=shown)
    if first["type"] == "missing":
        return ApiError(400, "missing_parameter", f"the field {shown!r} is missing", param=shown)
    message = _REASONS.get(name, first["msg"][:1].lower() + first["msg"][1:])
    value = printable(repr(document[name]))
    return ApiError(400, "invalid_value", f"{shown!r} cannot be {value}: {message}", param=shown)


def guidance_of(request: ImageRequest, info: ModelInfo) -> float:
    """The guidance of a request, or the model's default.

    Values below 1 become 1, no guidance, unless the pipeline itself interprets them.

    Args:
        request: body of the request.
        info: description of the model.
    """
    if request.guidance is None:
        return info.guidance
    return request.guidance if info.batching == "request" else max(1.0, request.guidance)


def size_of(request: ImageRequest, info: ModelInfo) -> tuple[int, int] | None:
    """Height and width of a request, or the model's default; None if the size is malformed.

    Args:
        request: body of the request.
        info: description of the model.
    """
    if request.size in (None, "auto"):
        return info.image_size
    match = _SIZE.fullmatch(request.size or "")
    return match and (int(match[2]), int(match[1]))


def check_against(request: ImageRequest, info: ModelInfo, limits: Limits) -> None:
    """Raise unless this model, with the limits of this server, can fulfil the request.

    Args:
        request: body of the request.
        info: description of the model.
        limits: limits of the server.

    Raises:
        ApiError: 400, with the name of the invalid field.
    """

    def refuse(param: str, message: str) -> ApiError:
        return ApiError(400, "invalid_value", message, param=param)

    if request.n > limits.max_images:
        raise refuse("n", f"n={request.n} is too many; this server draws up to {limits.max_images}")
    if request.steps is not None and not info.takes_steps:
        raise refuse("steps", f"{info.name} has {info.steps} steps, a fixed number; leave it out")
    if request.steps is not None and request.steps > info.max_steps:
        raise refuse("steps", f"steps={request.steps} is too many; choose 1 .. {info.max_steps}")
    size = size_of(request, info)
    supported = size == info.image_size or (size and info.sizes and size in info.sizes)
    if not supported and not info.follows_image:
        height, width = info.image_size
        raise refuse(
            "size",
            f"{info.name} draws {info.sizes or f'WIDTHxHEIGHT {width}x{height}'}, got "
            f"{str(request.size)[:40]!r}; or use 'auto' for {width}x{height}",
        )
    if guidance_of(request, info) != 1 and not info.takes_guidance:
        raise refuse("guidance", f"{info.name} takes no guidance; it must be 1")
    if request.negative_prompt:
        if not info.takes_negative_prompt:
            raise refuse("negative_prompt", f"{info.name} takes no negative prompt; leave it out")
        if guidance_of(request, info) == 1 and info.batching == "step":
            raise refuse(
                "negative_prompt",
                "a negative prompt has no effect at guidance 1; increase guidance, or leave it out",
            )
    for name in ("partial_images", "progress"):
        if getattr(request, name) and not request.stream:
            raise refuse(name, f'{name!r} needs "stream": true')
