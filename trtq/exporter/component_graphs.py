"""The parts of a pipeline beside the denoiser, as ONNX and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trtq.diffusion.folder import AUTOENCODERS, TEXT_ENCODERS
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.engine.ort import OrtEngine
from trtq.errors import GateError
from trtq.exporter.components import Component, autoencoder_components, text_component
from trtq.exporter.trace import trace_module
from trtq.graph.file import MODEL_FILE, save_graph
from trtq.graph.passes import CastLayerNormToFloat64
from trtq.progress import ProgressCallback
from trtq.seeds import seeded_generator
from trtq.snr import snr_db

__all__ = ["export_components"]

COMPONENT_DB = 60.0
"""Least SNR, in dB, of an exported text encoder or autoencoder; both sides compute in float32."""
_ASK_HIDDEN_STATES = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
_PASS_MASKS = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")


def _components(source: LoadedPipeline) -> list[Component]:
    pipeline = source.pipeline
    kind = type(pipeline).__name__
    found = []
    for name, tokenizer in TEXT_ENCODERS.items():
        encoder = getattr(pipeline, name, None)
        if encoder is None:
            continue
        masked = kind in _PASS_MASKS or bool(getattr(encoder.config, "use_attention_mask", False))
        hidden = kind in _ASK_HIDDEN_STATES and type(encoder).__name__.startswith("CLIP")
        found.append(
            text_component(
                name, encoder, getattr(pipeline, tokenizer), masked=masked, hidden_states=hidden
            )
        )
    for name in AUTOENCODERS:
        autoencoder = getattr(pipeline, name, None)
        if autoencoder is not None:
            found += autoencoder_components(autoencoder)
    return found


def export_components(
    source: LoadedPipeline, folder: Path, progress: ProgressCallback
) -> dict[str, float]:
    """Write every text encoder and autoencoder of a pipeline, and compare each with torch.

    Args:
        source: the pipeline.
        folder: of the whole pipeline.
        progress: called with the stage's name, the work done and the total.

    Returns:
        The SNR of each graph in dB, by folder.

    Raises:
        GateError: a graph is further from torch than `COMPONENT_DB` allows.
    """
    parity = {}
    components = _components(source)
    for index, component in enumerate(components):
        progress("export parts", index + 1, len(components))
        target = folder / component.folder
        graph = trace_module(
            component.module,
            component.inputs,
            component.outputs,
            axes=component.axes,
            images=component.cells,
        )
        CastLayerNormToFloat64()(graph)
        save_graph(graph, target)
        component.save_config(target)
        found = _parity(component, target / MODEL_FILE)
        if not found >= COMPONENT_DB:
            raise GateError(
                f"the exported {component.folder} is only {found:.1f} dB from torch, "
                f"{COMPONENT_DB:g} dB are required"
            )
        parity[component.folder] = found
    return parity


@torch.no_grad()
def _parity(component: Component, model: Path) -> float:
    generator = seeded_generator(0, "component parity", component.folder)
    inputs: dict[str, Tensor] = {}
    for name, example in component.inputs.items():
        if name == "input_ids":
            tokens = int(component.config.config.vocab_size)
            inputs[name] = torch.randint(0, tokens, example.shape, generator=generator)
        elif example.is_floating_point():
            # Half as high and wide as it was traced with: cheaper, and the size is shown to be free.
            half = 2 if name in component.cells else 1
            *rest, height, width = example.shape
            shape = (*rest, height // half, width // half)
            inputs[name] = torch.randn(shape, generator=generator)
        else:
            inputs[name] = example
    expected = component.module(*inputs.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    engine = OrtEngine(model, low_memory=True)
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
    given = engine.run(arrays)
    return min(
        snr_db(value, torch.from_numpy(given[name]))
        for name, value in zip(component.outputs, expected, strict=True)
    )
