"""Image and latent sizes: the size that a model was trained for, and the sizes that it supports.

A latent consists of cells; an autoencoder turns one cell into `cell_pixels` x `cell_pixels` pixels. A
model without latents has cells of one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtq.checkpoint.layout import parse_size
from trtq.checkpoint.wording import one_line
from trtq.errors import UsageError

__all__ = ["ModelSizes", "cell_pixels", "coarsest_cell", "trained_size"]

_MAX_CELLS = 8192
"""Maximum number of cells along one side of a latent, as in `trtq.checkpoint.pipeline_folder`."""
_MAX_ENLARGED = 16
"""Maximum ratio of height or width to the training size; images degrade from a ratio of 2 on."""


def cell_pixels(pipeline: Any) -> int:
    """Pixels along one side of a latent cell; 1 for a pipeline without an autoencoder."""
    for name in ("vae", "vqvae"):
        autoencoder = getattr(pipeline, name, None)
        if autoencoder is not None:
            return int(2 ** (len(autoencoder.config.block_out_channels) - 1))
    return 1


def coarsest_cell(config: Any) -> int:
    """Number of latent cells along one side of a cell at the denoiser's coarsest level.

    Args:
        config: configuration of a UNet, or of a transformer with a patch size.
    """
    if getattr(config, "patch_size", None) is not None:
        return int(config.patch_size)
    return int(2 ** (len(config.block_out_channels) - 1))


def trained_size(pipeline: Any, denoiser_name: str, name: str) -> tuple[int, int] | None:
    """Height and width, in latent cells, that the model was trained for; None if not configured.

    Args:
        pipeline: diffusers pipeline.
        denoiser_name: component that predicts the noise.
        name: name of the pipeline in messages.

    Raises:
        UsageError: the configured size is out of range.
    """
    size = getattr(getattr(pipeline, denoiser_name).config, "sample_size", None)
    if size is None:
        size = getattr(pipeline, "default_sample_size", None)
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(s, int) and 1 <= s <= _MAX_CELLS for s in sides):
        raise UsageError(
            f"{name}: sample_size of the {denoiser_name} must be one or two integers in "
            f"1 .. {_MAX_CELLS}, got {one_line(repr(size))}"
        )
    return sides[0], sides[1]


@dataclass(frozen=True)
class ModelSizes:
    """The image sizes that a pipeline supports.

    Attributes:
        name: name of the pipeline in messages.
        trained: height and width, in latent cells, that the model was trained for; None if unknown.
        cell_pixels: pixels along one side of a latent cell.
        multiple_of: divisor of a valid image height or width, in pixels.
    """

    name: str
    trained: tuple[int, int] | None
    cell_pixels: int
    multiple_of: int

    def latents_of(self, size: str) -> tuple[int, int]:
        """Height and width, in latent cells, of images of `HEIGHTxWIDTH` pixels.

        Raises:
            UsageError: `size` cannot be parsed, or the model does not support it.
        """
        height, width = parse_size(size)
        too_small = min(height, width) < self.multiple_of
        if too_small or height % self.multiple_of or width % self.multiple_of:
            raise UsageError(
                f"{self.name} cannot generate images of {size} pixels; height and width must be "
                f"multiples of {self.multiple_of}"
            )
        if self.trained is not None:
            limits = [_MAX_ENLARGED * side * self.cell_pixels for side in self.trained]
            if height > limits[0] or width > limits[1]:
                raise UsageError(
                    f"{self.name} cannot generate images of {size} pixels; choose HEIGHTxWIDTH up to "
                    f"{limits[0]}x{limits[1]}, {_MAX_ENLARGED} times the size of its training"
                )
        return height // self.cell_pixels, width // self.cell_pixels
