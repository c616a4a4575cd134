"""The interface between the batcher and a model.

Letters: B rows of a call; C, H, W channels, height and width of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trtq.artefact.graph_metadata import free_sizes
from trtq.errors import UsageError
from trtq.serve.models.samples import Samples, beside, repeated
from trtq.serve.models.solver import Solver

__all__ = [
    "GenerationRequest",
    "ImageModel",
    "InitialState",
    "Inputs",
    "ModelInfo",
    "Sizes",
    "class_label",
]

Arrays = Mapping[str, Samples]


@dataclass(frozen=True)
class Sizes:
    """The image sizes that a model draws.

    Attributes:
        smallest: minimum height and width, in pixels.
        largest: maximum height and width, in pixels.
        multiple_of: common divisor of all heights and widths, in pixels.
    """

    smallest: tuple[int, int]
    largest: tuple[int, int]
    multiple_of: int

    def __contains__(self, size: tuple[int, int]) -> bool:
        """Whether images of this height and width can be drawn."""
        return all(
            low <= side <= high and side % self.multiple_of == 0
            for low, side, high in zip(self.smallest, size, self.largest, strict=True)
        )

    def __str__(self) -> str:
        (low, left), (high, right) = self.smallest, self.largest
        return (
            f"WIDTHxHEIGHT from {left}x{low} to {right}x{high}, width and height multiples of "
            f"{self.multiple_of}"
        )

    @classmethod
    def of_graph(cls, metadata: Mapping[str, str], cell_pixels: int = 1) -> Sizes | None:
        """The sizes that the graph of a denoiser accepts; None if it accepts one size only.

        Args:
            metadata: metadata of the graph.
            cell_pixels: side of a latent cell, in pixels.
        """
        cells = free_sizes(metadata)
        if cells is None:
            return None
        low, high = (
            (height * cell_pixels, width * cell_pixels) for height, width in (cells.low, cells.high)
        )
        return cls(low, high, cells.cell * cell_pixels)


@dataclass(frozen=True)
class ModelInfo:
    """The description of a model.

    Attributes:
        name: model name used in requests.
        kind: kind of the prompt: `class`, `text`, or `none` for a model without conditions.
        classes: names of the classes; empty for other kinds.
        image_size: default height and width, in pixels.
        steps: default number of denoising steps.
        max_steps: maximum number of denoising steps, the length of the noise schedule.
        guidance: default classifier-free guidance; 1 is no guidance.
        takes_guidance: whether requests may set the guidance.
        provider: execution provider.
        bits: bit widths of weights and activations, e.g. `w4a8`; None: a float model.
        sizes: sizes that requests may specify; None: `image_size` only.
        takes_negative_prompt: whether requests may set a negative prompt.
        batching: `step`: images share denoiser calls; `request`: the pipeline draws one image at a time.
        takes_steps: whether requests may set the number of denoising steps.
        takes_image: whether requests may send images to edit.
        needs_image: whether requests must send images to edit.
        takes_mask: whether requests may send a mask.
        needs_mask: whether requests must send a mask, or an image with transparent pixels.
        follows_image: whether an edited image has the size of the image that the request sends.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    steps: int
    max_steps: int
    guidance: float
    takes_guidance: bool
    provider: str
    bits: str | None
    sizes: Sizes | None = None
    takes_negative_prompt: bool = False
    batching: Literal["step", "request"] = "step"
    takes_steps: bool = True
    takes_image: bool = False
    needs_image: bool = False
    takes_mask: bool = False
    needs_mask: bool = False
    follows_image: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """The images of one request, and how to draw them.

    Attributes:
        prompt: a text, or the name or number of a class.
        count: number of images; image i of a seed does not depend on the count.
        seed: seed of the initial noise.
        steps: number of denoising steps.
        guidance: classifier-free guidance; 1 is no guidance.
        size: height and width, in pixels; None: the model's default size.
        negative_prompt: description of what the images must not show; None: the pipeline's default.
        images: images to edit, PIL images of mode `RGB`.
        mask: PIL image of mode `L` and the size of the first image, white where it is edited; None: no
            mask.
    """

    prompt: str
    count: int
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int] | None = None
    negative_prompt: str | None = None
    images: tuple[Any, ...] = ()
    mask: Any = None


@dataclass(frozen=True)
class Inputs:
    """The denoiser's inputs for one image, except sample and timestep.

    Attributes:
        conditional: arrays by flat name, each `[1, ...]`.
        unconditional: the same arrays for "no condition"; None: the image needs one row only.
        shared: arrays without a batch axis, by flat name.
    """

    conditional: Arrays
    unconditional: Arrays | None = None
    shared: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class InitialState:
    """One image before its first denoising step.

    Attributes:
        x: initial noise, `[1, ...]`.
        inputs: the denoiser's inputs other than sample and timestep.
        solver: trajectory of the image.
        guidance: classifier-free guidance scale; ignored if `inputs.unconditional` is None.
    """

    x: Samples
    inputs: Inputs
    solver: Solver
    guidance: float


class ImageModel(ABC):
    """A model that a batcher can run. Its methods are called from several threads.

    Attributes:
        info: the description of the model.
        fixed_shapes: whether each batch size must be compiled before it runs at full speed.
        max_rows: maximum batch size of the engine, in rows; None: no limit.
        cheap_codec: whether `starts` and `decode` take less time than a switch to another thread.
    """

    info: ModelInfo
    fixed_shapes = False
    max_rows: int | None = None
    cheap_codec = False

    @abstractmethod
    def starts(self, request: GenerationRequest) -> Sequence[InitialState]:
        """The images of a request before their first denoising step.

        Raises:
            UsageError: the model does not accept the prompt, the number of steps or the guidance.
        """

    @abstractmethod
    def denoise(
        self, x: Samples, timestep: Samples, conditional: Arrays, shared: Arrays
    ) -> Samples:
        """x[B, ...], timestep float32[B] -> the prediction `[B, ...]`.

        Args:
            x: current samples, float32 `[B, ...]`.
            timestep: timestep of each row, float32[B].
            conditional: inputs with a batch axis, by flat name, `[B, ...]` each.
            shared: inputs without a batch axis, by flat name.

        Returns:
            The prediction, float32 `[B, ...]`, of the kind of `x` and in the same memory.
        """

    @abstractmethod
    def decode(self, x: Samples) -> np.ndarray:
        """A clean sample `[1, ...]` -> uint8[H,W] or uint8[H,W,3].

        Raises:
            NonFiniteError: the sample holds NaN or infinity.
        """

    def warm(self, rows: int) -> None:
        """Run the denoiser once with `rows` rows, so that later calls of this size are fast."""
        request = GenerationRequest(self.any_prompt(), 1, 0, self.info.steps, 1.0)
        (start,) = self.starts(request)
        conditional = {
            name: repeated(value, rows) for name, value in start.inputs.conditional.items()
        }
        x = repeated(start.x, rows)
        timestep = beside(np.full(rows, start.solver.timesteps[0], np.float32), x)
        self.denoise(x, timestep, conditional, start.inputs.shared)

    def any_prompt(self) -> str:
        """A prompt that the model accepts."""
        return self.info.classes[0] if self.info.classes else ""


def class_label(info: ModelInfo, prompt: str) -> int:
    """The index of the class that a prompt names.

    Args:
        info: description of the model.
        prompt: name or number of a class.

    Raises:
        UsageError: the model has no such class.
    """
    wanted = prompt.strip().casefold()
    for label, name in enumerate(info.classes):
        if wanted == name.casefold():
            return label
    if (
        wanted.isascii()
        and wanted.isdigit()
        and len(wanted) < 7
        and int(wanted) < len(info.classes)
    ):
        return int(wanted)
    shown = ", ".join(info.classes[:20]) + (", ..." if len(info.classes) > 20 else "")
    raise UsageError(
        f"{prompt[:80]!r} is not a class of {info.name}; the prompt of this model is one of {shown}, or "
        f"a number from 0 to {len(info.classes) - 1}"
    )
