"""The files of generated pictures, videos and sounds, and the texts inside them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.folder import check_outside_artefacts
from trtq.artefact.opened import Opened
from trtq.artefact.outputs import check_file, check_place
from trtq.calls.user_call import UserCall, accepted_arguments
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.errors import UsageError
from trtq.pipelines.called import steps_of
from trtq.pipelines.media import Media, frame_rate
from trtq.pipelines.media_files import check_video, pixels_of, save_sound, save_video
from trtq.pipelines.output_files import written_together
from trtq.pipelines.sheet import check_sheet, contact_sheet, save_png
from trtq.png_text import generation_texts

__all__ = ["MediaTarget", "MediaTexts"]

logger = logging.getLogger(__name__)

_SHEETS = (".png",)
_SINGLE = (".gif", ".mp4", ".wav")
_STEMS = {"image": "image-{}.png", "video": "video-{}.gif", "audio": "audio-{}.wav"}
_PLURALS = {"image": "images", "video": "videos", "audio": "sounds"}
_SHEET_PIXELS = 96


@dataclass(frozen=True)
class MediaTexts:
    """The PNG texts of generated pictures.

    Attributes:
        source: the pipeline.
        call: arguments of the call.
        seed: seed of the random numbers.
    """

    source: LoadedPipeline
    call: UserCall
    seed: int

    def prompts(self, count: int) -> list[str] | None:
        """The prompt of each of `count` results; None for a call without prompts."""
        prompt = self.call.arguments.get("prompt")
        if isinstance(prompt, str):
            return [prompt] * count
        if not isinstance(prompt, list) or not self.call.prompts:
            return None
        return [prompt[index * len(prompt) // count] for index in range(count)]

    def of(self, call: int, position: int, size: int, picture: Tensor) -> dict[str, str]:
        """The texts of a picture.

        Args:
            call: index of the call.
            position: index of the picture among those of its call.
            size: number of pictures of the call.
            picture: the picture `[..., H, W]`.
        """
        arguments = self.call.arguments
        negative = arguments.get("negative_prompt")
        prompts = self.prompts(size)
        return generation_texts(
            model=self.source.name,
            prompt=None if prompts is None else prompts[position],
            seed=self.seed,
            image=call,
            steps=steps_of(self.source.pipeline, self.call),
            guidance=self._guidance(),
            size=(picture.shape[-2], picture.shape[-1]),
            negative_prompt=negative if isinstance(negative, str) else None,
        )

    def _guidance(self) -> float | None:
        parameter = accepted_arguments(self.source.pipeline).get("guidance_scale")
        default = None if parameter is None else parameter.default
        value = self.call.arguments.get("guidance_scale", default)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class MediaTarget:
    """The requested output.

    Attributes:
        path: the file or folder.
        folder: whether each result gets a file in a folder.
    """

    path: Path
    folder: bool

    @classmethod
    def checked(
        cls, out: str | Path, count: int, source: Opened, *, overwrite: bool
    ) -> MediaTarget:
        """The target, if results can be written there.

        Raises:
            UsageError: the suffix is unknown, a folder does not exist, or a file must not be replaced.
            MissingDependencyError: MP4 needs a library that is not installed.
        """
        path, suffix = Path(out), Path(out).suffix.lower()
        folder = path.is_dir() or str(out).endswith(("/", os.sep)) or not suffix
        if not folder and suffix not in (*_SHEETS, *_SINGLE):
            raise UsageError(
                "--output must end in .png for images, .gif or .mp4 for a video, .wav for a sound, or "
                f"name a folder for one file per result; got {path.name!r}"
            )
        if not path.parent.is_dir():
            raise UsageError(f"the folder {path.parent} does not exist")
        if folder and path.exists() and not path.is_dir():
            raise UsageError(
                f"{path} is a file; give the name of a file with a suffix, or a folder"
            )
        if suffix in _SINGLE and not folder and count > 1:
            raise UsageError(
                f"{path.name} holds one result, and --images is {count}; give a folder"
            )
        if folder:
            check_place(path, source=source)
            files = [path / stem.format(f"{0:04d}") for stem in _STEMS.values()]
        else:
            files = [path]
            check_video(path)
        if not folder or path.is_dir():
            for file in files:
                check_file(file, overwrite=overwrite, source=source)
        check_outside_artefacts(files[0])
        return cls(path, folder)

    def write(
        self, results: Iterator[Media], texts: MediaTexts, calls: int, *, overwrite: bool
    ) -> tuple[list[Path], str, int]:
        """Write the results.

        Returns:
            The written files, the kind of the results, and their number.

        Raises:
            UsageError: the suffix does not fit the results.
        """
        if self.folder:
            return self._write_folder(results, texts, overwrite=overwrite)
        kept: list[Media] = []
        for media in results:
            if not kept:
                self._check_kind(media, calls)
            kept.append(media)
        first, rate = kept[0], frame_rate(dict(texts.call.arguments))
        if first.kind == "audio":
            save_sound(first.sounds[0], self.path, overwrite=overwrite)
        elif self.path.suffix.lower() in _SHEETS:
            pictures = [picture for media in kept for picture in media.pictures]
            sheet_texts = texts.of(0, 0, len(first), pictures[0])
            save_png(_sheet(pictures), self.path, sheet_texts, overwrite=overwrite)
        else:
            line = texts.of(0, 0, 1, first.pictures[0])["parameters"]
            save_video(first.pictures[0], self.path, rate, line, overwrite=overwrite)
        if first.kind == "video" and first.sounds:
            logger.warning(
                "the video has sound, which %s does not hold; give a folder", self.path.name
            )
        return [self.path], first.kind, sum(len(media) for media in kept)

    def _check_kind(self, media: Media, calls: int) -> None:
        """Raise unless the file can hold the results, after the first of the calls."""
        suffix = self.path.suffix.lower()
        what, fitting = (
            _PLURALS[media.kind],
            {
                "image": (".png",),
                "video": (".gif", ".mp4", ".png"),
                "audio": (".wav",),
            },
        )
        if suffix not in fitting[media.kind]:
            raise UsageError(
                f"the pipeline returns {what}, which {self.path.name} cannot hold; give a name that "
                f"ends in {' or '.join(fitting[media.kind])}, or a folder"
            )
        if suffix in _SINGLE and len(media) > 1:
            raise UsageError(
                f"{self.path.name} holds one result, and the call returns {len(media)} {what}; give a "
                "folder"
            )
        if suffix in _SHEETS:
            height, width = media.pictures[0].shape[-2:]
            frames = sum(math.prod(picture.shape[:-3]) for picture in media.pictures)
            check_sheet(calls * frames, height, width)

    def _write_folder(
        self, results: Iterator[Media], texts: MediaTexts, *, overwrite: bool
    ) -> tuple[list[Path], str, int]:
        files: list[Path] = []
        kind, count = "image", 0
        rate = frame_rate(dict(texts.call.arguments))
        with written_together(self.path) as writes:
            for index, media in enumerate(results):
                kind = media.kind
                for position, picture in enumerate(media.pictures):
                    file = self.path / _STEMS[kind].format(f"{count + position:04d}")
                    entries = texts.of(index, position, len(media), picture)
                    writes(file)
                    if kind == "image":
                        save_png(pixels_of(picture), file, entries, overwrite=overwrite)
                    else:
                        line = entries["parameters"]
                        save_video(picture, file, rate, line, overwrite=overwrite)
                    files.append(file)
                for position, sound in enumerate(media.sounds):
                    file = self.path / _STEMS["audio"].format(f"{count + position:04d}")
                    writes(file)
                    save_sound(sound, file, overwrite=overwrite)
                    files.append(file)
                count += len(media)
        return files, kind, count


def _sheet(pictures: Sequence[Tensor]) -> Any:
    """One sheet of pictures `[C,H,W]`, or of videos `[F,C,H,W]` with a row each.

    Raises:
        UsageError: the pictures have different sizes.
    """
    if len({picture.shape for picture in pictures}) > 1:
        raise UsageError(
            "the pictures have different sizes; give a folder for one file per picture"
        )
    video = pictures[0].ndim == 4
    stacked = torch.cat(list(pictures)) if video else torch.stack(list(pictures))
    if stacked.shape[1] == 4:
        # Transparent pixels are white.
        alpha = stacked[:, 3:]
        stacked = stacked[:, :3] * alpha + 1 - alpha
    count = len(stacked)
    columns = len(pictures[0]) if video else _columns(count)
    scale = max(1, _SHEET_PIXELS // stacked.shape[-1])
    return contact_sheet(stacked * 2 - 1, columns, scale, gap=scale)


def _columns(count: int) -> int:
    return min(count, 10) if count % 10 == 0 else math.ceil(math.sqrt(count))
