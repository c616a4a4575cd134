"""Files that a user passes into a pipeline's call: pictures, frames, sound and tensors."""

from __future__ import annotations

import re
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trtq.checkpoint.wording import list_names, one_line
from trtq.documents import shown
from trtq.errors import UsageError

__all__ = ["KINDS_OF_FILES", "is_mask", "read_file"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATIONS = (".gif", ".apng")
KINDS_OF_FILES = (
    "a picture (PNG, JPEG, WebP), frames (GIF, APNG or a folder of pictures), sound (WAV), or a "
    "tensor (.npy, .safetensors)"
)
_MAX_FRAMES = 4096
_MAX_PIXELS = 1 << 28
"""Maximum number of pixels of all frames of one file or folder, which take 0.8 GB."""
_MAX_SAMPLES = 1 << 28
_DTYPES = {1: np.uint8, 2: np.int16, 4: np.int32}
_NUMBER = re.compile(r"([0-9]+)")


def is_mask(name: str) -> bool:
    """Whether an argument of a pipeline's call takes a mask."""
    return "mask" in name


def read_file(path: Path, name: str, tensor: str | None = None) -> Any:
    """The value that a file holds, as a pipeline takes it.

    Args:
        path: path of the file, or of a folder of frames.
        name: name of the argument; a mask becomes a grey picture.
        tensor: name of the tensor in a `.safetensors` file; None: its only tensor.

    Returns:
        A PIL picture in RGB (grey for a mask), a list of such pictures, the float32 samples of a sound
        `[N]`, or `[1,C,N]` for several channels, in [-1, 1], or a tensor.

    Raises:
        UsageError: the file is missing, of another kind, too large or damaged.
    """
    suffix = path.suffix.lower()
    if tensor is not None and suffix != ".safetensors":
        raise UsageError(f"{path} has no named tensors; a .safetensors file has")
    try:
        if path.is_dir():
            return _read_folder(path, name)
        if not path.is_file():
            raise UsageError(f"there is no file {shown(str(path))} for the argument {name!r}")
        if suffix in (*IMAGES, *ANIMATIONS):
            pictures, animated = _read_pictures(path, name)
            return pictures if animated or suffix in ANIMATIONS else pictures[0]
        if suffix == ".wav":
            return _read_sound(path)
        if suffix == ".npy":
            return _read_array(path)
        if suffix == ".safetensors":
            return _read_tensor(path, tensor)
    except OSError as err:
        raise UsageError(f"cannot read {shown(str(path))}: {one_line(err)}") from err
    except ValueError as err:
        # A NUL in the name.
        if isinstance(err, UsageError):
            raise
        raise UsageError(f"cannot read {shown(str(path))}: {one_line(err)}") from err
    raise UsageError(
        f"{shown(str(path))} for the argument {name!r} is of an unknown kind; give {KINDS_OF_FILES}"
    )


def _read_pictures(path: Path, name: str) -> tuple[list[Any], bool]:
    """The frames of a picture file, and whether the file is animated."""
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    mode = "L" if is_mask(name) else "RGB"
    frames: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                count = int(getattr(picture, "n_frames", 1))
                _check_amount(path, count, picture.width * picture.height)
                for frame in ImageSequence.Iterator(picture):
                    frames.append(ImageOps.exif_transpose(frame).convert(mode))
    except UnidentifiedImageError as err:
        raise UsageError(
            f"{path} is no picture that Pillow can read; give {KINDS_OF_FILES}"
        ) from err
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as err:
        raise UsageError(
            f"{path} is too large: {one_line(err).split(', could')[0]}; make it smaller first"
        ) from err
    except UsageError:
        raise
    # Pillow's decoders raise any of these for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as err:
        raise UsageError(f"the picture {path} is damaged: {one_line(err)}") from err
    return frames, count > 1


def _check_amount(path: Path, count: int, pixels: int) -> None:
    """Raise unless the frames of a file or folder fit into memory."""
    if count > _MAX_FRAMES or count * pixels > _MAX_PIXELS:
        raise UsageError(
            f"{path} has {count} frames of {pixels:,} pixels each; at most {_MAX_FRAMES} frames and "
            f"{_MAX_PIXELS:,} pixels in total are allowed"
        )


def _read_folder(folder: Path, name: str) -> list[Any]:
    """The pictures of a folder, in the order of their names and numbers."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    others = [path.name for path in files if path.suffix.lower() not in IMAGES]
    if others:
        raise UsageError(
            f"the folder {folder} of frames holds {list_names(others)}; it may hold pictures only"
        )
    if not files:
        raise UsageError(f"the folder {folder} for the argument {name!r} holds no pictures")
    frames: list[Any] = []
    for path in sorted(files, key=lambda path: _natural(path.name)):
        frames += _read_pictures(path, name)[0][:1]
        _check_amount(folder, len(files), max(frame.width * frame.height for frame in frames))
    return frames


def _natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts `frame-10` after `frame-9`."""
    parts = _NUMBER.split(name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]


def _read_sound(path: Path) -> Tensor:
    """The samples of a WAV file: float32 `[N]`, or `[1,C,N]` for several channels, in [-1, 1]."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, count = file.getnchannels(), file.getsampwidth(), file.getnframes()
            if width not in _DTYPES:
                raise UsageError(
                    f"the sound {path} has {8 * width} bits per sample; convert it to 16 bits"
                )
            if channels * count > _MAX_SAMPLES:
                raise UsageError(
                    f"the sound {path} has {channels * count:,} samples; at most {_MAX_SAMPLES:,} are "
                    "allowed"
                )
            content = file.readframes(count)
    except (wave.Error, EOFError) as err:
        raise UsageError(
            f"the sound {path} is no WAV file of 8, 16 or 32 bits per sample: "
            f"{one_line(err)}; convert it to 16 bits"
        ) from err
    content = content[: len(content) - len(content) % (channels * width)]
    samples: np.ndarray = np.frombuffer(content, _DTYPES[width]).astype(np.float32)
    if not len(samples):
        raise UsageError(f"the sound {path} has no samples")
    # Samples of 8 bits are unsigned.
    samples = (samples - 128) / 128 if width == 1 else samples / float(1 << (8 * width - 1))
    waves = torch.from_numpy(samples.reshape(-1, channels).T.copy())
    return waves[0] if channels == 1 else waves[None]


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{path} is no array of numpy")
        return torch.from_numpy(array)
    except UsageError:
        raise
    except (ValueError, EOFError, TypeError, MemoryError) as err:
        raise UsageError(
            f"the array {path} cannot be read: {one_line(err)}; save numbers with numpy.save"
        ) from err


def _read_tensor(path: Path, name: str | None) -> Tensor:
    try:
        tensors = load_file(path)
    except SafetensorError as err:
        raise UsageError(f"{path} is no safetensors file: {one_line(err)}") from err
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name not in tensors:
        choice = f"has no tensor {shown(name)}" if name else f"holds {len(tensors)} tensors"
        raise UsageError(
            f"{path} {choice}; write "
            f'{{ file = "{path.name}", tensor = "NAME" }} in a file for --call, with one of: '
            f"{list_names(tensors)}"
        )
    return tensors[name]
