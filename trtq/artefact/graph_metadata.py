"""Metadata of a graph's file: its layers, calibrated timesteps and latent sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

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
"""Key of the kind and precision of every layer, by name, in a graph that was exported from a run."""
SIZES_KEY = "trtq.latent_sizes"
"""Key of the `FreeSizes` of a graph that accepts latents of several sizes."""
TIMESTEPS_KEY = "trtq.timesteps"
"""Key of the calibrated timesteps of a graph with tables, cleanest first."""


def check_timesteps(metadata: Mapping[str, str], timesteps: Sequence[float] | None) -> None:
    """Raise unless a graph was calibrated at the timesteps that its manifest lists.

    Args:
        metadata: metadata of the graph; not compared if it lists no timesteps, as in float models.
        timesteps: timesteps of the manifest, cleanest first; None for a float model.

    Raises:
        ArtefactError: the graph was calibrated at other timesteps.
    """
    text = metadata.get(TIMESTEPS_KEY)
    if text is None:
        return
    calibrated = graph_timesteps(text)
    if timesteps is None or not np.array_equal(
        np.asarray(calibrated, np.float32), np.asarray(timesteps, np.float32)
    ):
        raise ArtefactError(
            f"the graph was calibrated at the timesteps {shown(calibrated)}, but its "
            f"manifest lists {shown(timesteps)}; the manifest was edited, or the graph belongs to "
            "another artefact"
        )


def check_layers(metadata: Mapping[str, str], layers: Mapping[str, str]) -> None:
    """Raise unless a graph holds the layers that its manifest lists, with the same bits.

    Args:
        metadata: metadata of the graph; not compared if it lists no layers.
        layers: kind and precision, e.g. `conv2d w4a8`, by layer name, from the manifest.

    Raises:
        ArtefactError: the layers differ; the message names the first that does.
    """
    text = metadata.get(LAYERS_KEY)
    if text is None:
        return
    in_graph = _parse(text, LAYERS_KEY)
    if not isinstance(in_graph, dict):
        raise ArtefactError(f"the graph's {LAYERS_KEY} is damaged: it holds {shown(in_graph)}")
    for name in (*in_graph, *layers):
        if in_graph.get(name) != layers.get(name):
            raise ArtefactError(
                f"the graph and its manifest disagree about the layer {shown(name)}: the manifest says "
                f"{shown(layers.get(name))}, the graph {shown(in_graph.get(name))}"
            )


def graph_timesteps(text: str) -> list[float]:
    """Parse the timesteps in a graph's metadata, cleanest first.

    Returns:
        The timesteps, cleanest first.

    Raises:
        ArtefactError: the text is not a list of increasing numbers.
    """
    timesteps = _parse(text, TIMESTEPS_KEY)
    if (
        not isinstance(timesteps, list)
        or not timesteps
        or not all(type(timestep) in (int, float) for timestep in timesteps)
        or not all(before < after for before, after in pairwise(timesteps))
    ):
        raise ArtefactError(
            f"the graph's {TIMESTEPS_KEY} is damaged: timesteps rise, got {shown(timesteps)}"
        )
    return [float(timestep) for timestep in timesteps]


def _parse(text: str, key: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as err:
        raise ArtefactError(f"the graph's {key} is damaged: {err}") from err


_Cells = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
_Side = Annotated[list[_Cells], Field(min_length=2, max_length=2)]


class FreeSizes(BaseModel):
    """The range of latent sizes that a graph accepts, in latent pixels.

    Attributes:
        low: smallest height and width.
        high: largest height and width.
        cell: granularity; every height and width is a multiple of `cell`.
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

    def to_metadata(self) -> dict[str, str]:
        """The metadata entry that `free_sizes` reads."""
        return {SIZES_KEY: json.dumps(self.model_dump())}


def free_sizes(metadata: Mapping[str, str]) -> FreeSizes | None:
    """The sizes that a graph accepts, from its metadata; None if it accepts a single size.

    Raises:
        ArtefactError: the metadata is malformed.
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
