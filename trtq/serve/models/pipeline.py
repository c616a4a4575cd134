"""Any pipeline that trtq opens, served through torch and diffusers."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.diffusion.encode import Encoded, check_inputs, takes_negative
from trtq.diffusion.latents import draw_noise, latent_decoder
from trtq.diffusion.layout import class_names
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.truncation import find_truncations
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.openvino import OpenVinoEngine
from trtq.engine.tensorrt.run import TensorRtEngine
from trtq.engine.torch_gpu import GpuDenoiser
from trtq.errors import UsageError
from trtq.seeds import seeded_generator
from trtq.serve.logs import FIELDS
from trtq.serve.models.base import (
    Arrays,
    GenerationRequest,
    ImageModel,
    InitialState,
    Inputs,
    ModelInfo,
    Sizes,
    class_label,
)
from trtq.serve.models.graph import GraphCall
from trtq.serve.models.solver import Ddim, SchedulerSolver, Solver
from trtq.serve.models.torch_free import pixels

__all__ = ["PipelineModel"]

logger = logging.getLogger(__name__)


class PipelineModel(ImageModel):
    """A diffusers pipeline, taken apart into what a batcher needs.

    Args:
        source: as `open_any` gives it.
        name: by which requests ask for it.
        provider: what runs it.
        shapes: batch sizes that may be in use at once.
        artefact: what `source` was loaded from; by default its folder.

    Raises:
        UsageError: it is not known what its denoiser has to be told.
    """

    def __init__(
        self,
        source: LoadedPipeline,
        name: str,
        provider: str,
        shapes: int = 2,
        artefact: Opened | None = None,
    ) -> None:
        self._source = source
        self._decode = latent_decoder(source)
        self.fixed_shapes = provider == OpenVinoEngine.provider
        self._graph: GraphCall | None = None
        if isinstance(source.denoiser, EngineDenoiser):
            engine = source.denoiser.engine
            if isinstance(engine, OpenVinoEngine):
                engine.max_shapes = shapes
            if isinstance(engine, TensorRtEngine):
                self.max_rows = engine.largest(source.family.sample)[0]
            self._graph = GraphCall(engine)
        config = dict(source.pipeline.scheduler.config)
        config.setdefault("_class_name", type(source.pipeline.scheduler).__name__)
        self._ddim = Ddim(config) if Ddim.knows(config) else None
        # Threads of the server and the batcher share a tokenizer and torch's modules.
        self._lock = threading.Lock()
        sizes = None if self.fixed_shapes else _sizes(source)
        if artefact is None:
            artefact = open_artefact(source.folder, verify=False)
        self.info = replace(_info(source, name, provider, artefact), sizes=sizes)
        if self.info.kind == "text":
            check_inputs(source.pipeline)
        if self._ddim is None:
            # Before the first request: a scheduler that breaks would refuse every one.
            source.check_steps(self.info.steps)

    @torch.no_grad()
    def starts(self, drawing: GenerationRequest) -> Sequence[InitialState]:
        """The images of a request before their first step."""
        source = self._source
        if drawing.size is not None and drawing.size != source.image_size:
            source = source.sized("{}x{}".format(*drawing.size))
        with self._lock:
            inputs = self._inputs(source, drawing)
        found = []
        for index in range(drawing.count):
            generator = seeded_generator(drawing.seed, "image", index)
            noise = draw_noise(source, generator).numpy()
            solver = self._solver(source, drawing.steps, generator)
            found.append(
                InitialState(noise * solver.initial_scale, inputs, solver, drawing.guidance)
            )
        return found

    def _solver(self, source: LoadedPipeline, steps: int, generator: torch.Generator) -> Solver:
        if self._ddim is not None:
            return self._ddim.solver(steps)
        scheduler = source.stepped_scheduler(steps)
        return SchedulerSolver(scheduler, generator, source.family.timestep_scale)

    def _inputs(self, source: LoadedPipeline, drawing: GenerationRequest) -> Inputs:
        if self.info.kind == "none":
            if drawing.prompt.strip():
                raise UsageError(f"{self.info.name} takes no prompt; leave it empty")
            return Inputs({})
        if self.info.kind == "class":
            conditions = source.conditions(torch.tensor([class_label(self.info, drawing.prompt)]))
            encoded = Encoded(conditions.conditional, conditions.unconditional)
        else:
            encoded = source.encode([drawing.prompt], drawing.negative_prompt)
            self._log_cuts(drawing)
        unconditional = None
        if drawing.guidance != 1:
            if encoded.unconditional is None:
                raise UsageError(f"{self.info.name} takes no guidance; it must be 1")
            unconditional = _arrays(encoded.unconditional)
        return Inputs(_arrays(encoded.conditional), unconditional, _arrays(encoded.shared))

    def _log_cuts(self, drawing: GenerationRequest) -> None:
        """Say in the log that a prompt is cut, but not what it says: prompts are not logged."""
        texts = [drawing.prompt, *filter(None, [drawing.negative_prompt])]
        for cut in find_truncations(self._source.pipeline, texts):
            field = "prompt" if cut.prompt == drawing.prompt else "negative_prompt"
            facts: dict[str, Any] = {
                "model": self.info.name,
                "field": field,
                "encoder": cut.encoder,
            }
            facts |= {"tokens": cut.tokens, "kept": cut.kept}
            logger.warning("prompt cut off", extra={FIELDS: facts})

    @torch.no_grad()
    def denoise(
        self, x: np.ndarray, timestep: np.ndarray, conditional: Arrays, shared: Arrays
    ) -> np.ndarray:
        """x[B, ...], timestep float32[B] -> the prediction `[B, ...]`."""
        given = {**conditional, **shared}
        if self._graph is not None:
            return self._graph({self._source.family.sample: x, "timestep": timestep, **given})
        values = {name: torch.from_numpy(value) for name, value in given.items()}
        arguments = self._source.family.arguments(
            torch.from_numpy(x), torch.from_numpy(timestep), values
        )
        predicted: Tensor = self._source.denoiser(**arguments, return_dict=False)[0]
        found: np.ndarray = predicted.float().cpu().numpy()
        return found

    @torch.no_grad()
    def decode(self, x: np.ndarray) -> np.ndarray:
        """A clean sample `[1, ...]` -> uint8[H,W] or uint8[H,W,3]."""
        with self._lock, quiet_diffusers():
            image = self._decode(torch.from_numpy(x))
        return pixels(image.float().numpy(), self.info.name)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _sizes(source: LoadedPipeline) -> Sizes | None:
    """Those that the denoiser's graph takes; in torch up to twice the height and width of its own.

    None for one size only.
    """
    pixels = source.cell_pixels
    if isinstance(source.denoiser, EngineDenoiser):
        return Sizes.of_graph(source.denoiser.engine.metadata, pixels)
    if isinstance(source.denoiser, GpuDenoiser):
        return None  # Each shape is a CUDA graph, and keeps its memory.
    takes_size = "height" in inspect.signature(source.pipeline.__call__).parameters
    if not (source.family.free_size and takes_size):
        return None
    step = pixels * source.coarsest
    config: Any = source.denoiser.config
    # Stable Diffusion 3 cuts the positions of its patches out of a table.
    most = config.get("pos_embed_max_size")
    height, width = (
        2 * side if most is None else min(2 * side, most * step) for side in source.image_size
    )
    return Sizes((step, step), (height, width), step)


def _info(source: LoadedPipeline, name: str, provider: str, artefact: Opened) -> ModelInfo:
    folder = source.folder
    kind = "class" if source.classes is not None else "none" if source.prompts is None else "text"
    if kind == "none" and source.model_class != "UNet2DModel":
        raise UsageError(
            f"{type(source.pipeline).__name__} with a {source.model_class} cannot be served: it is not "
            "known what its denoiser has to be told"
        )
    guidance = source.guidance
    if artefact.guidance is not None and source.embedded_guidance is None:
        guidance = artefact.guidance
    info = ModelInfo(
        name=name,
        kind=kind,
        classes=tuple(class_names(folder, source.classes)) if source.classes is not None else (),
        image_size=source.image_size,
        steps=artefact.steps or DEFAULT_STEPS,
        max_steps=int(source.pipeline.scheduler.config.num_train_timesteps),
        guidance=guidance,
        takes_guidance=kind == "text" and source.embedded_guidance is None,
        provider=provider,
        bits=artefact.bits if artefact.low_bit else None,
        takes_negative_prompt=kind == "text" and takes_negative(source.pipeline),
    )
    if kind != "class" or source.classes is None:
        return info
    label = torch.zeros(1, dtype=torch.long)
    return replace(info, takes_guidance=source.conditions(label).unconditional is not None)
