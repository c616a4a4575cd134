"""What a server needs of a model, whatever lies behind it. Letters: B rows of a call, C, H, W images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtq.artefact.graph_metadata import free_sizes
from trtq.errors import UsageError
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

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """Image sizes that a model draws: heights and widths in pixels, multiples of `step`.

    Attributes:
        smallest: height and width.
        largest: height and width.
        step: between two heights, and between two widths.
    """

    smallest: tuple[int, int]
    largest: tuple[int, int]
    step: int

    def __contains__(self, size: tuple[int, int]) -> bool:
        """Whether images of this height and width can be drawn."""
        return all(
            least <= side <= most and side % self.step == 0
            for least, side, most in zip(self.smallest, size, self.largest, strict=True)
        )

    def __str__(self) -> str:
        (low, left), (high, right) = self.smallest, self.largest
        return (
            f"WIDTHxHEIGHT from {left}x{low} to {right}x{high}, width and height multiples of "
            f"{self.step}"
        )

    @classmethod
    def of_graph(cls, metadata: Mapping[str, str], pixels: int = 1) -> Sizes | None:
        """Those that a denoiser's graph takes; None for one size only.

        Args:
            metadata: of the graph.
            pixels: along one side of a cell of its latents.
        """
        found = free_sizes(metadata)
        if found is None:
            return None
        low, high = ((side[0] * pixels, side[1] * pixels) for side in (found.low, found.high))
        return cls(low, high, found.cell * pixels)


@dataclass(frozen=True)
class ModelInfo:
    """What a server says about a model.

    Attributes:
        name: by which requests ask for it.
        kind: what a prompt is: `class`, `text`, or `none` for a model without conditions.
        classes: names of the classes; empty for other kinds.
        image_size: height and width in pixels, unless a request says otherwise.
        steps: denoising steps unless a request says otherwise.
        max_steps: what the noise schedule has.
        guidance: unless a request says otherwise; 1 is none.
        takes_guidance: whether requests may choose it.
        provider: what runs it.
        bits: of weights and activations, e.g. `w4a8`; None for a float model.
        sizes: that requests may choose; None: `image_size` only.
        takes_negative_prompt: whether requests may say what is not to be shown.
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


@dataclass(frozen=True)
class GenerationRequest:
    """What one request wants drawn.

    Attributes:
        prompt: a text or the name of a class.
        count: number of images; image i of a seed is the same in every request.
        seed: of the starting noise.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 is none.
        size: height and width in pixels; None: the model's own.
        negative_prompt: what is not to be shown; None: what the pipeline has where none is given.
    """

    prompt: str
    count: int
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int] | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Inputs:
    """The denoiser's inputs of one image beside sample and timestep.

    Attributes:
        conditional: by flat name, each `[1, ...]`.
        unconditional: the same for "no condition"; None: one row is enough.
        shared: inputs without a batch axis.
    """

    conditional: Arrays
    unconditional: Arrays | None = None
    shared: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class InitialState:
    """One image before its first step.

    Attributes:
        x: starting noise, `[1, ...]`.
        inputs: what the denoiser is told.
        solver: its trajectory.
        guidance: weight of the condition where `inputs` has both halves.
    """

    x: np.ndarray
    inputs: Inputs
    solver: Solver
    guidance: float


class ImageModel(ABC):
    """A model that a batcher can run; its methods are called from several threads."""

    info: ModelInfo
    fixed_shapes = False
    """Whether each batch size has to be compiled before it runs well."""
    max_rows: int | None = None
    """Of a call, where what runs it was built for so many."""
    cheap_codec = False
    """Whether `starts` and `decode` take less time than handing them to another thread."""

    @abstractmethod
    def starts(self, drawing: GenerationRequest) -> Sequence[InitialState]:
        """The images of a request before their first step.

        Raises:
            UsageError: the prompt, the steps or the guidance are not what the model takes.
        """

    @abstractmethod
    def denoise(
        self, x: np.ndarray, timestep: np.ndarray, conditional: Arrays, shared: Arrays
    ) -> np.ndarray:
        """x[B, ...], timestep float32[B] -> the prediction `[B, ...]`."""

    @abstractmethod
    def decode(self, x: np.ndarray) -> np.ndarray:
        """A clean sample `[1, ...]` -> uint8[H,W] or uint8[H,W,3].

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """

    def warm(self, rows: int) -> None:
        """Make the denoiser ready for calls of so many rows."""
        drawing = GenerationRequest(self.any_prompt(), 1, 0, self.info.steps, 1.0)
        (start,) = self.starts(drawing)
        many = {
            name: np.repeat(value, rows, axis=0) for name, value in start.inputs.conditional.items()
        }
        x = np.repeat(start.x, rows, axis=0)
        timestep = np.full(rows, start.solver.timesteps[0], np.float32)
        self.denoise(x, timestep, many, start.inputs.shared)

    def any_prompt(self) -> str:
        """A prompt that the model takes."""
        return self.info.classes[0] if self.info.classes else ""


def class_label(info: ModelInfo, prompt: str) -> int:
    """The label of the class that a prompt names.

    Raises:
        UsageError: there is no such class.
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
