"""Training scenes of the shapes model: one or two coloured shapes on white, with a caption.

The colour of a pixel depends on its distance to each shape's outline, so edges are smooth. In a
scene with two shapes, one is above or left of the other; each arrangement has two equivalent
captions.
Letters: B scenes, H = W = `SIZE` pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ATTRIBUTES", "COLOURS", "SHAPES", "SIZE", "Scene", "draw_scenes", "random_scene"]

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.62, 0.25),
    "blue": (0.16, 0.30, 0.85),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.58, 0.20, 0.72),
    "black": (0.10, 0.10, 0.10),
}
ARRANGEMENTS = ("single", "above", "left of")
CONVERSE = {"above": "below", "left of": "right of"}
# 1 of CONVERSE_EVERY captions names the lower or right shape first. With 1 of 2, neither the order of
# the words nor the relation alone would correlate with the positions, and a small model would do no
# better than chance.
CONVERSE_EVERY = 4
ATTRIBUTES = {
    "arrangement": len(ARRANGEMENTS),
    "first_colour": len(COLOURS),
    "first_shape": len(SHAPES),
    "second_colour": len(COLOURS) + 1,
    "second_shape": len(SHAPES) + 1,
}
"""Number of values of each attribute that the classifier predicts; the last value of the second shape's
attributes means "no second shape"."""


@dataclass(frozen=True)
class Scene:
    """Content of an image.

    Attributes:
        arrangement: index into `ARRANGEMENTS`.
        first: (colour, shape) indices of the single, upper or left shape.
        second: (colour, shape) indices of the lower or right shape; None for a single shape.
        swapped: whether the caption names the second shape first.
    """

    arrangement: int
    first: tuple[int, int]
    second: tuple[int, int] | None = None
    swapped: bool = False

    @property
    def caption(self) -> str:
        """Caption of the scene, e.g. `a red circle above a blue square`."""
        first = _words(*self.first)
        if self.second is None:
            return first
        second = _words(*self.second)
        relation = ARRANGEMENTS[self.arrangement]
        if self.swapped:
            return f"{second} {CONVERSE[relation]} {first}"
        return f"{first} {relation} {second}"

    @property
    def labels(self) -> dict[str, int]:
        """Value of each attribute in `ATTRIBUTES`."""
        colour, shape = self.second or (len(COLOURS), len(SHAPES))
        return {
            "arrangement": self.arrangement,
            "first_colour": self.first[0],
            "first_shape": self.first[1],
            "second_colour": colour,
            "second_shape": shape,
        }


def _words(colour: int, shape: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]}"


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def random_scene(generator: torch.Generator) -> Scene:
    """Choose a random scene with uniformly distributed arrangement, colours and shapes."""

    def thing() -> tuple[int, int]:
        return _integer(len(COLOURS), generator), _integer(len(SHAPES), generator)

    arrangement = _integer(len(ARRANGEMENTS), generator)
    if arrangement == 0:
        return Scene(0, thing())
    swapped = _integer(CONVERSE_EVERY, generator) == 0
    return Scene(arrangement, thing(), thing(), swapped)


def _distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline in pixels, negative inside; `x`, `y` from the centre, y down."""
    slope = math.sqrt(0.75)
    arm = 0.36 * radius
    square = torch.maximum(x.abs(), y.abs())
    circle = (x.square() + y.square()).sqrt() - radius
    triangle = torch.maximum(slope * x.abs() - 0.5 * y - 0.5 * radius, y - 0.75 * radius)
    cross = torch.minimum(
        torch.maximum(x.abs() - arm, y.abs() - radius),
        torch.maximum(y.abs() - arm, x.abs() - radius),
    )
    distances = torch.stack([circle, square - 0.85 * radius, triangle, cross])
    return distances.gather(0, shape.expand_as(x)[None])[0]


def draw_scenes(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Render B scenes as float32[B,3,H,W] in [-1, 1], with random positions and sizes."""
    count = len(scenes)
    palette = torch.tensor([*COLOURS.values(), (1.0, 1.0, 1.0)])
    arrangement = torch.tensor([scene.arrangement for scene in scenes])

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    single = arrangement == 0
    canvas = torch.ones(count, 3, SIZE, SIZE)
    pixel = torch.arange(SIZE) + 0.5
    for order in range(2):
        along = uniform(7.5, 9.5) if order == 0 else uniform(22.5, 24.5)
        across = uniform(11.0, 21.0)
        x = torch.where(arrangement == 2, along, across)
        y = torch.where(arrangement == 1, along, across)
        x, y = torch.where(single, uniform(11, 21), x), torch.where(single, uniform(11, 21), y)
        radius = torch.where(single, uniform(7, 10), uniform(5.2, 6.8))
        things = [scene.first if order == 0 else scene.second for scene in scenes]
        shape = torch.tensor([thing[1] if thing else 0 for thing in things])
        colour = palette[torch.tensor([thing[0] if thing else len(COLOURS) for thing in things])]
        distance = _distance(
            shape[:, None, None],
            (pixel[None, None, :] - x[:, None, None]).expand(count, SIZE, SIZE),
            (pixel[None, :, None] - y[:, None, None]).expand(count, SIZE, SIZE),
            radius[:, None, None],
        )
        cover = (0.5 - distance).clamp(0, 1)[:, None]
        visible = torch.tensor([thing is not None for thing in things])[:, None, None, None]
        cover = cover * visible
        canvas = canvas * (1 - cover) + colour[:, :, None, None] * cover
    return canvas * 2 - 1
