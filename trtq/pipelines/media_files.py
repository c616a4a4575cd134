"""Videos and sounds in files."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq._optional import require
from trtq.artefact.outputs import new_file
from trtq.errors import ArtefactError
from trtq.pipelines.media import Sound

__all__ = ["check_video", "pixels_of", "save_sound", "save_video"]


def pixels_of(picture: Tensor) -> np.ndarray:
    """A picture float[C,H,W] in [0, 1] as uint8[H,W,3], or [H,W,4] if it has transparency."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def check_video(path: Path) -> None:
    """Raise unless the libraries for a video file are installed.

    Raises:
        MissingDependencyError: MP4 needs imageio with ffmpeg.
    """
    if path.suffix.lower() == ".mp4":
        require("imageio")
        require("imageio_ffmpeg")


def save_video(
    frames: Tensor, path: Path, fps: float, comment: str = "", *, overwrite: bool = False
) -> None:
    """Write a video, completely or not at all.

    Args:
        frames: frames, float[F,C,H,W] in [0, 1].
        path: file that ends in `.gif` or `.mp4`.
        fps: frames per second.
        comment: text inside a GIF.
        overwrite: replace an existing file.

    Raises:
        MissingDependencyError: see `check_video`.
        UsageError: the file exists, or its folder does not.
        ArtefactError: writing fails.
    """
    check_video(path)
    pictures = [pixels_of(frame)[..., :3] for frame in frames]
    with new_file(path, overwrite=overwrite) as partial:
        if path.suffix.lower() == ".mp4":
            _write_mp4(pictures, partial, fps)
        else:
            _write_gif(pictures, partial, fps, comment)


def _write_gif(pictures: list[np.ndarray], path: Path, fps: float, comment: str) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    # A GIF counts in hundredths of a second; players slow down below two of them.
    duration = max(20, round(1000 / fps))
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=duration,
        loop=0,
        comment=comment.encode(),
    )


def _write_mp4(pictures: list[np.ndarray], path: Path, fps: float) -> None:
    imageio: Any = require("imageio")
    try:
        imageio.mimwrite(
            path,
            pictures,
            format="FFMPEG",
            fps=fps,
            macro_block_size=1,  # Keep sides that are no multiples of 16.
            output_params=["-f", "mp4"],  # The unfinished file has another suffix.
        )
    except (ValueError, RuntimeError) as err:
        raise ArtefactError(f"ffmpeg cannot write the video: {err}; write a GIF instead") from err


def save_sound(sound: Sound, path: Path, *, overwrite: bool = False) -> None:
    """Write a WAV file of 16 bits, completely or not at all.

    Args:
        sound: the sound.
        path: file that ends in `.wav`.
        overwrite: replace an existing file.

    Raises:
        UsageError: the file exists, or its folder does not.
        ArtefactError: writing fails.
    """
    samples = (sound.samples.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()
    with new_file(path, overwrite=overwrite) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(samples.astype("<i2").tobytes())
