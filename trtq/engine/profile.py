"""Ranges of a graph's free axes, for which engines are built and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtq.artefact.graph_metadata import free_sizes
from trtq.artefact.manifest import (
    Manifest,
)
from trtq.checkpoint.layout import parse_size, parse_sizes
from trtq.diffusion.folder import DECODER
from trtq.documents import read_object
from trtq.engine.tensorrt.job import Profile
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import MODEL_FILE
from trtq.graph.runtimes.prepare import load_graph

__all__ = ["MAX_TOKENS", "Range", "axis_ranges", "exported_profile", "profile_of"]

Range = tuple[int, int, int]


MAX_TOKENS = 512
"""Maximum number of tokens of an engine whose graph takes any number."""
_TOKENS: Range = (1, 77, MAX_TOKENS)
"""Smallest, typical and largest number of tokens, for encoders that take any number."""


def axis_ranges(
    folder: Path, name: str, manifest: Manifest, model: Any, batch: tuple[int, int] | None
) -> dict[str, Range]:
    """Smallest, typical and largest length of every free axis, by name of the axis.

    Args:
        folder: the ONNX folder.
        name: name of the graph in the folder.
        manifest: manifest of the folder.
        model: the graph, an `onnx_ir` model.
        batch: minimum and maximum batch size, in images; None: the batch sizes of the export.

    Returns:
        The triple `(smallest, typical, largest)` of every free axis, by name of the axis.
    """
    low, high = batch or manifest.options.batch
    # With guidance the pipeline passes conditional and unconditional items in one batch.
    recipe = manifest.recipe
    guided = name == manifest.denoiser and (recipe is None or recipe.guided)
    often, high = (2 * low, 2 * high) if guided else (low, high)
    ranges: dict[str, Range] = {"batch": (low, often, high), "timesteps": (1, often, high)}
    ranges["tokens"] = _TOKENS
    sizes = free_sizes(model.metadata_props)
    if sizes is not None:
        for axis, side in enumerate(("height", "width")):
            ranges[side] = (sizes.low[axis], sizes.low[axis], sizes.high[axis])
    elif manifest.options.size is not None:
        smallest, largest = (parse_size(text) for text in parse_sizes(manifest.options.size))
        factor = _pixels_of_a_latent(folder / name) if name == DECODER else 1
        for axis, side in enumerate(("height", "width")):
            minimum, maximum = smallest[axis] // factor, largest[axis] // factor
            ranges[side] = (minimum, minimum, maximum)
    return ranges


def _pixels_of_a_latent(folder: Path) -> int:
    """Image pixels per latent pixel along one side: doubled by every level except the first.

    Raises:
        ArtefactError: the autoencoder's configuration does not list its levels.
    """
    try:
        levels = len(read_object(folder / "config.json", finite=False)["block_out_channels"])
    except (KeyError, TypeError) as err:
        raise ArtefactError(
            f"{folder / 'config.json'} does not say how many levels it has"
        ) from err
    return int(2 ** (levels - 1))


def exported_profile(folder: Path, name: str, manifest: Manifest) -> Profile:
    """The ranges of a graph's inputs for which its folder was exported."""
    model = load_graph(folder / name / MODEL_FILE)
    return profile_of(model, axis_ranges(folder, name, manifest, model, None))


def profile_of(model: Any, ranges: dict[str, Range]) -> Profile:
    """The ranges of a graph's inputs, from the ranges of its free axes.

    Raises:
        UsageError: the range of a free axis is unknown.
    """
    profile: Profile = {}
    for value in model.graph.inputs:
        shapes: tuple[list[int], list[int], list[int]] = ([], [], [])
        for size in value.shape:
            axis = size if isinstance(size, int) else str(size)
            if isinstance(axis, str) and axis not in ranges:
                raise UsageError(
                    f"the input {value.name!r} has a free axis {axis!r} of unknown range; export the "
                    "model again with this version"
                )
            three = (axis,) * 3 if isinstance(axis, int) else ranges[axis]
            for shape, length in zip(shapes, three, strict=True):
                shape.append(length)
        profile[value.name] = shapes
    return profile
