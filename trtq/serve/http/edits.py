"""The body of an image edit: a form with OpenAI's fields, images and a mask."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtq.serve.http.errors import ApiError, printable
from trtq.serve.http.multipart import FormPart, parse_form
from trtq.serve.http.schema import ImageRequest, validate
from trtq.serve.models.base import ModelInfo

__all__ = [
    "EDITS_PATH",
    "Pictures",
    "Uploads",
    "check_uploads",
    "edit_schema",
    "parse_edit",
    "read_pictures",
]

EDITS_PATH = "/v1/images/edits"
IMAGE_FIELDS = ("image", "image[]")
MASK_FIELD = "mask"
MAX_IMAGES = 16
MAX_PIXELS = 1 << 24
"""Maximum number of pixels of all images of a request, which take 48 MiB."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_PROMPTS = ("prompt", "negative_prompt")
_TEXTS = ("model", "size", "user")
_WHITE = 255


@dataclass(frozen=True)
class Uploads:
    """The files of an edit.

    Attributes:
        images: files of the images.
        mask: file of the mask; None: no mask.
    """

    images: tuple[bytes, ...]
    mask: bytes | None = None


@dataclass(frozen=True)
class Pictures:
    """The images of an edit, see `trtq.serve.models.base.GenerationRequest`.

    Attributes:
        images: PIL images of mode `RGB`.
        mask: PIL image of mode `L`, white where the first image is edited; None: no mask.
    """

    images: tuple[Any, ...]
    mask: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first image, in pixels."""
        width, height = self.images[0].size
        return height, width


def edit_schema() -> dict[str, object]:
    """JSON schema of the form."""
    schema = ImageRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["title"] = "ImageEdit"
    schema["description"] = f"The fields of `POST {EDITS_PATH}`."
    schema["properties"] |= {
        "image": {
            "type": "array",
            "items": file,
            "minItems": 1,
            "maxItems": MAX_IMAGES,
            "description": f"Images to edit, each a file ({', '.join(_FORMATS)}); usually one.",
        },
        MASK_FIELD: file
        | {
            "description": "Image of the same size. Its transparent pixels are edited; of an image "
            "without transparent pixels, the white ones are."
        },
    }
    schema["required"] = ["image", "prompt"]
    return schema


def parse_edit(content_type: str, body: bytes) -> tuple[ImageRequest, Uploads]:
    """Parse the body of an edit; except for prompts, the texts "" and `null` count as missing.

    Args:
        content_type: the header `Content-Type`.
        body: body of the request.

    Raises:
        ApiError: 400, with the name of the invalid field.
    """
    images: list[bytes] = []
    masks: list[bytes] = []
    document: dict[str, Any] = {}
    for part in parse_form(content_type, body):
        if part.name in (*IMAGE_FIELDS, MASK_FIELD):
            files = masks if part.name == MASK_FIELD else images
            # A form of a browser sends an empty file for a field without a file.
            files += [part.content] if part.content else []
        elif part.name in document:
            shown = printable(part.name)
            raise _invalid(shown, f"the field {shown!r} is sent twice")
        else:
            document[part.name] = _value(part)
    if len(masks) > 1:
        raise _invalid(MASK_FIELD, f"an edit takes one mask, got {len(masks)}")
    if len(images) > MAX_IMAGES:
        raise _invalid("image", f"an edit takes up to {MAX_IMAGES} images, got {len(images)}")
    return validate(document), Uploads(tuple(images), masks[0] if masks else None)


def _value(part: FormPart) -> Any:
    """The value of a field as JSON would hold it; a text that is none of its type stays a text."""
    text = part.text
    if part.name in _PROMPTS:
        return text
    if text in ("", "null"):
        return None
    if part.name in _TEXTS:
        return text
    try:
        value = json.loads(text.lower())
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float) else text


def check_uploads(uploads: Uploads | None, info: ModelInfo) -> None:
    """Raise unless the model takes the files of a request.

    Args:
        uploads: the files; None: a request without files.
        info: description of the model.

    Raises:
        ApiError: 400, with the name of the field.
    """
    if uploads is None:
        if info.needs_image:
            raise _invalid("model", f"{info.name} edits images: send them to POST {EDITS_PATH}")
        return
    if not info.takes_image:
        raise _invalid("image", f"this model takes no image: {info.name} draws from prompts only")
    if not uploads.images:
        raise ApiError(400, "missing_parameter", "the file 'image' is missing", param="image")
    if uploads.mask is not None and not info.takes_mask:
        raise _invalid(MASK_FIELD, f"{info.name} takes no mask; leave it out")


def read_pictures(uploads: Uploads, size: str | None, info: ModelInfo) -> Pictures:
    """Decode the files of an edit.

    Args:
        uploads: files that `check_uploads` accepts.
        size: the field `size` of the request.
        info: description of the model.

    Raises:
        ApiError: 400, a file is no image or too large, or the model does not support its size.
    """
    decoded = [_decode(file, "image") for file in uploads.images]
    _check_pixels(decoded)
    mask = None if uploads.mask is None else _decode(uploads.mask, MASK_FIELD)
    first = decoded[0]
    if mask is not None and mask.size != first.size:
        raise _invalid(
            MASK_FIELD,
            f"the mask has {_shown(mask.size)} pixels and the image {_shown(first.size)} "
            "(WIDTHxHEIGHT); both must have one size",
        )
    if mask is None and info.takes_mask and _transparency(first) is not None:
        mask = first
    if mask is None and info.needs_mask:
        raise ApiError(
            400,
            "missing_parameter",
            f"{info.name} needs a mask: send the file 'mask', or an image with transparent pixels",
            param=MASK_FIELD,
        )
    area = None if mask is None else _edited_area(mask)
    pictures = Pictures(tuple(image.convert("RGB") for image in decoded), area)
    if info.follows_image:
        _check_size(pictures, size, info)
    return pictures


def _decode(file: bytes, param: str) -> Any:
    """A file as a PIL image, upright.

    Raises:
        ApiError: 400, the file is no image, damaged, or has too many pixels.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(file), formats=_FORMATS)
    except Image.DecompressionBombError as err:
        raise _too_many_pixels(param) from err
    except (
        Exception
    ) as err:  # Pillow's decoders raise many exceptions for files that are no images.
        allowed = ", ".join(_FORMATS)
        raise _invalid(param, f"the file {param!r} is no image; send {allowed}") from err
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(param)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as err:  # See above.
        raise _invalid(param, f"the image in {param!r} is damaged") from err


def _check_pixels(images: Sequence[Any]) -> None:
    if sum(image.width * image.height for image in images) > MAX_PIXELS:
        raise _too_many_pixels("image")


def _too_many_pixels(param: str) -> ApiError:
    text = f"the images of a request may have up to {MAX_PIXELS} pixels together; send smaller ones"
    return _invalid(param, text)


def _transparency(image: Any) -> Any | None:
    """The alpha channel of an image; None if every pixel is opaque."""
    if not (image.mode.endswith(("A", "a")) or "transparency" in image.info):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == _WHITE else alpha


def _edited_area(mask: Any) -> Any:
    """A mask as pipelines take it: OpenAI edits transparent pixels, pipelines edit white pixels."""
    alpha = _transparency(mask)
    return mask.convert("L") if alpha is None else alpha.point(lambda value: _WHITE - value)


def _check_size(pictures: Pictures, size: str | None, info: ModelInfo) -> None:
    """Raise unless a model whose images have the size of the uploaded image supports this size."""
    height, width = pictures.size
    if (height, width) != info.image_size and not (info.sizes and (height, width) in info.sizes):
        supported = info.sizes or "WIDTHxHEIGHT {1}x{0}".format(*info.image_size)
        raise _invalid("image", f"{info.name} edits images of {supported}, got {width}x{height}")
    if size not in (None, "auto", f"{width}x{height}"):
        raise _invalid(
            "size",
            f"the edited images of {info.name} have the size of the image, {width}x{height}; got "
            f"{str(size)[:40]!r}; leave it out",
        )


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_value", message, param=param)
