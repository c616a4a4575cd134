"""Pictures, videos and sounds in the results of diffusers' pipelines, as tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trtq.errors import ArtefactError, NonFiniteError

__all__ = ["DEFAULT_FPS", "Media", "Sound", "frame_rate", "media_of"]

logger = logging.getLogger(__name__)

Kind = Literal["image", "video", "audio"]
DEFAULT_FPS = 16.0
_DEFAULT_RATE = 44_100
_MAX_RATE = 1 << 20
_CHANNELS = (1, 3, 4)
_IMAGES = ("images", "image", "rgb", "prediction")
_VIDEOS = ("frames", "video", "videos")
_SOUNDS = ("audios", "audio", "sound")
_RATES = ("sampling_rate", "sample_rate", "output_sampling_rate")


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound.

    Attributes:
        samples: float32[C,N] in [-1, 1].
        rate: sampling rate in Hz.
    """

    samples: Tensor
    rate: int


@dataclass(frozen=True, eq=False)
class Media:
    """The result of one call of a pipeline.

    Attributes:
        kind: `image`, `video` or `audio`.
        pictures: pictures float32[C,H,W] or videos float32[F,C,H,W], in [0, 1]; C is 1, 3 or 4.
        sounds: sounds, of which a video may have one each.
    """

    kind: Kind
    pictures: tuple[Tensor, ...] = ()
    sounds: tuple[Sound, ...] = ()

    def __len__(self) -> int:
        """Number of pictures, videos or sounds."""
        return len(self.sounds if self.kind == "audio" else self.pictures)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The pictures or videos, or the samples of the sounds."""
        if self.kind == "audio":
            return tuple(sound.samples for sound in self.sounds)
        return self.pictures


def media_of(result: Any, pipeline: Any, *, raw: bool = False) -> Media:
    """Read the result of a pipeline's call.

    Args:
        result: result of the call, with attributes such as `images`, `frames`, `audios` or
            `prediction`; values are PIL pictures, arrays or tensors, in any usual nesting.
        pipeline: the pipeline, whose configuration holds the sampling rate of sounds.
        raw: whether tensors of images lie in [-1, 1].

    Raises:
        ArtefactError: the result holds neither pictures, videos nor sounds; the message names what it
            holds.
        NonFiniteError: a value is NaN or infinite.
    """
    values = _fields_of(result)
    video, image, audio = (_first(values, names) for names in (_VIDEOS, _IMAGES, _SOUNDS))
    sounds: tuple[Sound, ...] = ()
    if audio is not None:
        rate = _rate_of(result, pipeline)
        sounds = tuple(Sound(samples, rate) for samples in _sounds(values[audio]))
    if video is not None:
        return Media("video", tuple(_checked(v) for v in _videos(values[video])), sounds)
    if image is not None:
        pictures = [_unit(p, image) for p in _pictures(values[image], raw)]
        return Media("image", tuple(_checked(picture) for picture in pictures), sounds)
    if sounds:
        return Media("audio", (), sounds)
    held = ", ".join(values) or "no fields"
    raise ArtefactError(
        f"{type(pipeline).__name__} returns {type(result).__name__} with {held}, which is no picture, "
        "video or sound; use the pipeline of trtq.load in Python"
    )


def _fields_of(result: Any) -> dict[str, Any]:
    """The fields of a result that hold something."""
    if is_dataclass(result) and not isinstance(result, type):
        pairs = {entry.name: getattr(result, entry.name) for entry in fields(result)}
    elif isinstance(result, dict):
        pairs = dict(result)
    else:
        pairs = dict(getattr(result, "__dict__", {}))
    return {name: value for name, value in pairs.items() if value is not None}


def _first(values: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in values), None)


def _tensor(value: Any) -> Tensor:
    """A PIL picture, an array or a tensor as a float tensor; integers become 0 .. 1."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.dtype == object:
            raise ArtefactError(f"the pipeline returns a {type(value).__name__} of objects")
        tensor = torch.from_numpy(np.array(array))
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    return tensor.float() / 65535 if tensor.dtype == torch.uint16 else tensor.float()


def _channels_first(value: Any) -> Tensor:
    """Pictures `[..., C, H, W]` of a value whose channels come first in tensors, else last."""
    tensor = _tensor(value)
    if isinstance(value, Tensor):
        return tensor
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.shape[-1] not in _CHANNELS:
        # Grey pictures without an axis for the channels, unless the channels come first.
        first = tensor.ndim > 3 and tensor.shape[-3] in _CHANNELS
        return tensor if first else tensor.unsqueeze(-3)
    return tensor.movedim(-1, -3)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "getbands")


def _pictures(value: Any, raw: bool = False) -> list[Tensor]:
    """Pictures `[C,H,W]` of any nesting of lists, arrays and tensors."""
    if isinstance(value, list | tuple):
        return [picture for item in value for picture in _pictures(item, raw)]
    tensor = _channels_first(value)
    if raw and isinstance(value, Tensor):
        tensor = (tensor + 1) / 2
    return list(tensor.reshape(-1, *tensor.shape[-3:])) if tensor.ndim >= 3 else [tensor[None]]


def _videos(value: Any) -> list[Tensor]:
    """Videos `[F,C,H,W]`."""
    if isinstance(value, list | tuple):
        items = list(value)
        if items and (_is_picture(items[0]) or getattr(items[0], "ndim", 0) == 3):
            return [torch.stack(_pictures(items))]
        return [video for item in items for video in _videos(item)]
    tensor = _channels_first(value)
    if tensor.ndim == 5 and tensor.shape[2] not in _CHANNELS and tensor.shape[1] in _CHANNELS:
        tensor = tensor.transpose(1, 2)
    return list(tensor) if tensor.ndim == 5 else [tensor]


def _sounds(value: Any) -> list[Tensor]:
    """Sounds `[C,N]` of `[B,C,N]`, `[B,N]` or `[N]`."""
    if isinstance(value, list | tuple):
        return [sound for item in value for sound in _sounds(item)]
    samples = _tensor(value)
    if not bool(torch.isfinite(samples).all()):
        raise NonFiniteError("the pipeline returns a sound that holds NaN or infinity")
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim == 2:
        samples = samples[:, None]
    return [sound.clamp(-1, 1) for sound in samples.reshape(-1, *samples.shape[-2:])]


def _unit(picture: Tensor, name: str) -> Tensor:
    """A picture in [0, 1]; predictions such as depths and normals are scaled."""
    if name != "prediction" or not picture.numel():
        return picture
    low, high = float(picture.min()), float(picture.max())
    if low >= 0 and high <= 1:
        return picture
    if len(picture) == 3 and low >= -1 and high <= 1:
        return (picture + 1) / 2
    return (picture - low) / max(high - low, 1e-12)


def _checked(pictures: Tensor) -> Tensor:
    """The pictures, if they are finite and have 1, 3 or 4 channels."""
    if pictures.ndim not in (3, 4) or pictures.shape[-3] not in _CHANNELS:
        raise ArtefactError(
            f"the pipeline returns pictures of shape {list(pictures.shape)}, which are latents; leave "
            "output_type out of the call"
        )
    if not bool(torch.isfinite(pictures).all()):
        raise NonFiniteError("the pipeline returns pictures that hold NaN or infinity")
    return pictures.clamp(0, 1)


def _rate_of(result: Any, pipeline: Any) -> int:
    """The sampling rate of a pipeline's sounds in Hz."""
    places = [result, *(getattr(pipeline, name, None) for name in ("vocoder", "vae", "audio_vae"))]
    places += [getattr(pipeline, name, None) for name in ("transformer", "unet")]
    for place in [inner for outer in places for inner in (outer, getattr(outer, "config", None))]:
        for name in _RATES:
            rate = getattr(place, name, None)
            if isinstance(rate, int | float) and 1 <= rate <= _MAX_RATE:
                return int(rate)
    logger.warning(
        "%s gives no sampling rate; the sound is written with %d Hz",
        type(pipeline).__name__,
        _DEFAULT_RATE,
    )
    return _DEFAULT_RATE


def frame_rate(arguments: dict[str, Any]) -> float:
    """Frames per second of a call's video: its argument `fps` or `frame_rate`, else 16."""
    for name in ("fps", "frame_rate"):
        rate = arguments.get(name)
        if isinstance(rate, int | float) and 0 < rate <= 1000:
            return float(rate)
    return DEFAULT_FPS
