"""Ranges of the inputs of a recorded call's graph, for which engines are built and opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtq.artefact.manifest import Manifest
from trtq.artefact.manifest_rows import AxisRow, GraphRow
from trtq.calls.stored import CALL_FOLDER, load_call
from trtq.engine.profile import MAX_TOKENS, Range, profile_of
from trtq.engine.tensorrt.job import Profile
from trtq.errors import UsageError
from trtq.graph.file import MODEL_FILE
from trtq.graph.runtimes.prepare import load_graph

__all__ = ["call_profile", "exported_call_profile", "within_profile"]


def call_profile(row: GraphRow, model: Any, batch: tuple[int, int], images: int) -> Profile:
    """The ranges of the inputs of a recorded call's graph.

    Args:
        row: entry of the graph in the manifest.
        model: the graph, an `onnx_ir` model.
        batch: minimum and maximum batch size, in images.
        images: number of images of the recorded call, at least 1.

    Returns:
        Minimum, typical and maximum shape of every input.

    Raises:
        UsageError: the manifest does not give the size of a free axis.
    """
    ranges: dict[str, Range] = {}
    for value in model.graph.inputs:
        axes = {axis.axis: axis for axis in row.free.get(str(value.name), ())}
        for index, size in enumerate(value.shape):
            # Axes of equal size have one name, and the builder accepts one range for it.
            if isinstance(size, int) or str(size) in ranges:
                continue
            if index not in axes or axes[index].seen is None:
                raise UsageError(
                    f"the manifest gives no size of axis {index} of the input {value.name!r}; export "
                    "the model again with this version"
                )
            ranges[str(size)] = _range(axes[index], batch, images)
    return profile_of(model, ranges)


def _range(axis: AxisRow, batch: tuple[int, int], images: int) -> Range:
    """Smallest, typical and largest size of a free axis."""
    assert axis.seen is not None
    if axis.varies == "batch":
        # With guidance the recorded call passes two rows per image.
        low, high = (max(1, count * axis.seen // images) for count in batch)
        return low, low, high
    if axis.high is not None:
        return axis.low, axis.low, axis.high
    return axis.low, max(axis.low, axis.seen), max(MAX_TOKENS, axis.seen)


def exported_call_profile(folder: Path, row: GraphRow, manifest: Manifest) -> Profile:
    """The ranges of a recorded call's graph for which its folder was exported."""
    model = load_graph(folder / row.folder / MODEL_FILE)
    images = load_call(folder / CALL_FOLDER).images
    return call_profile(row, model, manifest.options.batch, images)


def within_profile(row: GraphRow, profile: Mapping[str, Sequence[Sequence[int]]]) -> GraphRow:
    """The entry of a graph whose free axes are limited to the ranges of its engine."""
    free = {
        path: [
            axis.model_copy(
                update={"low": profile[path][0][axis.axis], "high": profile[path][2][axis.axis]}
            )
            if path in profile and axis.axis < len(profile[path][0])
            else axis
            for axis in axes
        ]
        for path, axes in row.free.items()
    }
    return row.model_copy(update={"free": free})
