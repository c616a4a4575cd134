"""A denoiser as an ONNX graph: traced, rewritten and written to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from trtq.artefact.graph_metadata import LAYERS_KEY, TIMESTEPS_KEY, FreeSizes
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.exporter.trace import trace
from trtq.graph.file import save_graph
from trtq.graph.nodes import LOW_BIT_OPERATORS, WITHOUT_PLUGIN
from trtq.graph.passes import (
    BroadcastTimestep,
    CastLayerNormToFloat64,
    DecomposeGroupNorm,
    DecomposeSilu,
    DecomposeTimestepEmbedding,
    DropNoopSqueeze,
    ExpandLowBitToQdq,
    LowBitToPlugins,
)
from trtq.runs.folder import OpenRun
from trtq.seeds import seeded_generator

__all__ = ["TARGETS", "Target", "write_graph"]

Target = Literal["qdq", "plugin"]


TARGETS: tuple[Target, ...] = get_args(Target)


_TRACED_BATCH = 2


def write_graph(
    folder: Path,
    denoiser: nn.Module,
    source: LoadedPipeline,
    run: OpenRun | None,
    largest: str,
    *,
    half: bool,
    target: Target = "qdq",
) -> None:
    """Trace a denoiser and write its graph without checks.

    Args:
        folder: new folder of the graph and its external data.
        denoiser: the float model, or the float skeleton of a run; changed in place.
        source: pipeline of the denoiser, at the smallest image size of the graph.
        run: the run with the integers of the low-bit layers; None for a float model.
        largest: largest image size `HEIGHTxWIDTH` that the graph accepts, in pixels.
        half: whether everything except integers is in half precision.
        target: form of the low-bit layers.
    """
    layers = run.stored.layers if run else {}
    conditions = source.draw_conditions(_TRACED_BATCH, seeded_generator(0, "traced conditions"))
    x = torch.zeros(_TRACED_BATCH, *source.sample_shape)
    low, high = source.latent_size, source.latents_of(largest)
    cell = None if low == high else source.coarsest
    model = trace(denoiser, x, conditions, set(layers), half=half, cell=cell)
    if cell is not None:
        sizes = FreeSizes(low=list(low), high=list(high), cell=cell)
        model.metadata_props.update(sizes.to_metadata())
    BroadcastTimestep()(model)
    DropNoopSqueeze()(model)
    DecomposeGroupNorm()(model)
    CastLayerNormToFloat64()(model)
    DecomposeSilu()(model)
    DecomposeTimestepEmbedding()(model)
    if run is not None:
        operators = WITHOUT_PLUGIN if target == "plugin" else LOW_BIT_OPERATORS
        ExpandLowBitToQdq(layers, run.table, operators)(model)
        LowBitToPlugins(layers, run.table)(model)
        model.metadata_props[TIMESTEPS_KEY] = json.dumps(run.table.timesteps.tolist())
        model.metadata_props[LAYERS_KEY] = json.dumps(run.manifest.layer_kinds())
    save_graph(model, folder)
