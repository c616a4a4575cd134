"""What a graph's file says about itself, under keys of ours in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtq.documents import explain_first, parse_json, shown
from trtq.errors import ArtefactError
from trtq.limits import MAX_SIDE

__all__ = [
    "LAYERS_KEY",
    "SIZES_KEY",
    "TIMESTEPS_KEY",
    "FreeSizes",
    "check_layers",
    "check_timesteps",
    "free_sizes",
    "graph_timesteps",
]

LAYERS_KEY = "trtq.layers"
"""Kind and precision of every layer by its name, of a graph that was made from a run."""
SIZES_KEY = "trtq.latent_sizes"
"""Of a graph with free sizes: smallest and largest latents, and the step between them."""
TIMESTEPS_KEY = "trtq.timesteps"
"""Metadata of a graph with tables: the timesteps that it was calibrated at, cleanest first."""


def check_timesteps(metadata: Mapping[str, str], timesteps: Sequence[float] | None) -> None:
    """Nothing, if a graph was calibrated at the timesteps that its manifest lists.

    Args:
        metadata: of the graph; one that says nothing, as float models do, is not compared.
        timesteps: from the manifest, cleanest first; None: a float model.

    Raises:
        ArtefactError: it was calibrated at others.
    """
    text = metadata.get(TIMESTEPS_KEY)
    if text is None:
        return
    own = graph_timesteps(text)
    if timesteps is None or not np.array_equal(
        np.asarray(own, np.float32), np.asarray(timesteps, np.float32)
    ):
        raise ArtefactError(
            f"the graph was calibrated at the timesteps {shown(own)}, its manifest says "
            f"{shown(timesteps)}; the manifest was edited, or the graph is another one's"
        )


def check_layers(metadata: Mapping[str, str], layers: Mapping[str, str]) -> None:
    """Nothing, if a graph holds the layers that its manifest lists, with these bits.

    Args:
        metadata: of the graph; one that says nothing is not compared.
        layers: kind and precision by name, from the manifest, e.g. `conv2d w4a8`.

    Raises:
        ArtefactError: it holds others; the message names the first.
    """
    text = metadata.get(LAYERS_KEY)
    if text is None:
        return
    try:
        own = parse_json(text)
    except ValueError as err:
        raise ArtefactError(f"the graph's {LAYERS_KEY} is damaged: {err}") from err
    if not isinstance(own, dict):
        raise ArtefactError(f"the graph's {LAYERS_KEY} is damaged: it holds {shown(own)}")
    for name in (*own, *layers):
        if own.get(name) != layers.get(name):
            raise ArtefactError(
                f"the graph and its manifest disagree about the layer {shown(name)}: the manifest says "
                f"{shown(layers.get(name))}, the graph {shown(own.get(name))}"
            )


def graph_timesteps(text: str) -> list[float]:
    """The timesteps in a graph's metadata, cleanest first.

    Raises:
        ArtefactError: it holds something else.
    """
    try:
        found = parse_json(text)
    except ValueError as err:
        raise ArtefactError(f"the graph's {TIMESTEPS_KEY} is damaged: {err}") from err
    if (
        not isinstance(found, list)
        or not found
        or not all(type(one) in (int, float) for one in found)
        or not all(before < after for before, after in pairwise(found))
    ):
        raise ArtefactError(
            f"the graph's {TIMESTEPS_KEY} is damaged: timesteps rise, got {shown(found)}"
        )
    return [float(one) for one in found]


_Cells = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
_Side = Annotated[list[_Cells], Field(min_length=2, max_length=2)]


class FreeSizes(BaseModel):
    """What `SIZES_KEY` tells of a graph, all in cells of the latents.

    Attributes:
        low: smallest height and width.
        high: largest height and width.
        cell: between two of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: _Side
    high: _Side
    cell: _Cells

    @model_validator(mode="after")
    def _in_order(self) -> FreeSizes:
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(
                f"the largest size {self.high} is smaller than the smallest {self.low}"
            )
        return self


def free_sizes(metadata: Mapping[str, str]) -> FreeSizes | None:
    """The sizes that a graph takes, from its metadata; None for one size only.

    Raises:
        ArtefactError: the metadata has another form.
    """
    text = metadata.get(SIZES_KEY)
    if text is None:
        return None
    try:
        return FreeSizes.model_validate(parse_json(text))
    except ValidationError as err:
        raise ArtefactError(f"the graph's {SIZES_KEY} is damaged: {explain_first(err)}") from err
    except (ValueError, TypeError) as err:
        raise ArtefactError(f"the graph's {SIZES_KEY} is damaged: {err}") from err
