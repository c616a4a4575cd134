"""Images in PNG files: one contact sheet, or one file per image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trtq.artefact.outputs import new_file
from trtq.errors import UsageError
from trtq.png_text import with_texts

__all__ = ["check_sheet", "contact_sheet", "save_png"]

MAX_PIXELS = 1 << 27
"""Maximum number of pixels of all images on one sheet, which take 1.5 GB in float32."""


def check_sheet(count: int, height: int, width: int) -> None:
    """Raise unless `count` images of `height` times `width` pixels fit on one sheet.

    Raises:
        UsageError: the images do not fit into memory together.
    """
    max_count = max(1, MAX_PIXELS // (height * width))
    if count > max_count:
        raise UsageError(
            f"{count} images of {height}x{width} pixels (HEIGHTxWIDTH) are too many for one sheet; "
            f"choose at most {max_count}"
        )


def contact_sheet(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Arrange images[B,C,H,W] in [-1, 1] on one white sheet uint8[H',W',3], row by row.

    Args:
        images: the images.
        columns: number of images in a row.
        scale: magnification, a whole number.
        gap: distance between images, in pixels.

    Returns:
        Pixels of the sheet, uint8[H',W',3].
    """
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(
    sheet: np.ndarray,
    path: Path,
    texts: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write pixels to a PNG file, completely or not at all.

    Args:
        sheet: pixels, uint8[H,W,3].
        path: path of the file.
        texts: PNG texts by keyword, see `trtq.png_text`.
        overwrite: replace an existing file.

    Raises:
        UsageError: the folder does not exist or cannot be written, or the file exists.
        ArtefactError: the disk is full, or writing fails.
    """
    from PIL import Image

    buffer = io.BytesIO()
    with new_file(path, overwrite=overwrite) as partial:
        Image.fromarray(sheet).save(buffer, format="PNG")
        partial.write_bytes(with_texts(buffer.getvalue(), texts or {}))
