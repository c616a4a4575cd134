"""Export of a pipeline's text encoders and autoencoders to ONNX, compared with torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trtq.checkpoint.components import AUTOENCODERS, TEXT_ENCODERS
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
"""Minimum SNR, in dB, of an exported text encoder or autoencoder; both sides compute in float32."""


def _components(source: LoadedPipeline) -> list[Component]:
    pipeline = source.pipeline
    components = []
    calls = source.own_call.encoder_calls(tuple(TEXT_ENCODERS), source.image_size)
    for name, tokenizer in TEXT_ENCODERS.items():
        encoder = getattr(pipeline, name, None)
        if encoder is None:
            continue
        passed = calls.get(name, {})
        masked = passed.get("attention_mask") is not None
        hidden = bool(passed.get("output_hidden_states"))
        components.append(
            text_component(
                name, encoder, getattr(pipeline, tokenizer), masked=masked, hidden_states=hidden
            )
        )
    for name in AUTOENCODERS:
        autoencoder = getattr(pipeline, name, None)
        if autoencoder is not None:
            components += autoencoder_components(autoencoder)
    return components


def export_components(
    source: LoadedPipeline, folder: Path, progress: ProgressCallback
) -> dict[str, float]:
    """Write every text encoder and autoencoder of a pipeline, and compare each with torch.

    Args:
        source: the loaded pipeline.
        folder: folder of the exported pipeline.
        progress: callback that receives the stage's name, the work done and the total.

    Returns:
        SNR of each graph in dB, by folder.

    Raises:
        GateError: the SNR of a graph is below `COMPONENT_DB`.
    """
    parity = {}
    components = _components(source)
    for index, component in enumerate(components):
        progress("export parts", index + 1, len(components))
        destination = folder / component.folder
        graph = trace_module(
            component.module,
            component.inputs,
            component.outputs,
            axes=component.axes,
            images=component.cells,
        )
        CastLayerNormToFloat64()(graph)
        save_graph(graph, destination)
        component.save_config(destination)
        db = _parity(component, destination / MODEL_FILE)
        if not db >= COMPONENT_DB:
            raise GateError(
                f"the exported {component.folder} is only {db:.1f} dB from torch, "
                f"{COMPONENT_DB:g} dB are required"
            )
        parity[component.folder] = db
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
            # Half the traced height and width: cheaper, and shows that the size is free.
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
