"""The model of any pipeline that trtq opens, run with torch and diffusers."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtq.artefact.opened import DEFAULT_STEPS, Opened, open_artefact
from trtq.checkpoint.layout import class_names
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.diffusion.encode import Encoded, takes_negative
from trtq.diffusion.pipeline import LoadedPipeline
from trtq.diffusion.truncation import find_truncations
from trtq.engine.denoiser import EngineDenoiser
from trtq.engine.openvino import OpenVinoEngine
from trtq.engine.ort import GPU_PROVIDERS, OrtSession
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
from trtq.serve.models.latents import check_noise, draw_noise, latent_decoder
from trtq.serve.models.samples import Samples
from trtq.serve.models.solver import Ddim, SchedulerSolver, Solver
from trtq.serve.models.torch_free import pixels

__all__ = ["PipelineModel", "device_of_samples"]

logger = logging.getLogger(__name__)


class PipelineModel(ImageModel):
    """A diffusers pipeline as an `ImageModel`.

    Args:
        source: the pipeline, as `open_any` returns it.
        name: model name used in requests.
        provider: execution provider of the denoiser.
        shapes: maximum number of batch sizes in use at once.
        artefact: artefact that `source` was loaded from; None: the artefact in the folder of `source`.

    Raises:
        UsageError: the inputs of the pipeline's denoiser are unknown.
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
        check_noise(source)
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
        self._device = device_of_samples(self._graph)
        config = dict(source.pipeline.scheduler.config)
        config.setdefault("_class_name", type(source.pipeline.scheduler).__name__)
        self._ddim = Ddim(config) if Ddim.knows(config) else None
        # The threads of the server and of the batcher share the tokenizer and torch's modules.
        self._lock = threading.Lock()
        sizes = None if self.fixed_shapes else _sizes(source)
        if artefact is None:
            artefact = open_artefact(source.folder, verify=False)
        self.info = replace(_info(source, name, provider, artefact), sizes=sizes)
        if self._ddim is None:
            # A broken scheduler would fail every request, so check it before the first request.
            source.check_steps(self.info.steps)

    @torch.no_grad()
    def starts(self, request: GenerationRequest) -> Sequence[InitialState]:
        """The images of a request before their first denoising step."""
        source = self._source
        if request.size is not None and request.size != source.image_size:
            source = source.sized("{}x{}".format(*request.size))
        with self._lock:
            inputs = self._inputs(source, request)
        states = []
        for index in range(request.count):
            generator = seeded_generator(request.seed, "image", index)
            noise = draw_noise(source, generator)
            solver = self._solver(source, request.steps, generator)
            x = self._placed(noise * solver.initial_scale)
            states.append(InitialState(x, inputs, solver, request.guidance))
        return states

    def _solver(self, source: LoadedPipeline, steps: int, generator: torch.Generator) -> Solver:
        if self._ddim is not None:
            return self._ddim.solver(steps)
        with self._lock:
            source.check_steps(steps)
            call = source.rehearsal(steps)
        return SchedulerSolver(deepcopy(call.scheduler), generator, call.timestep_scale)

    def _inputs(self, source: LoadedPipeline, request: GenerationRequest) -> Inputs:
        if self.info.kind == "none":
            if request.prompt.strip():
                raise UsageError(f"{self.info.name} takes no prompt; leave it empty")
            return Inputs({})
        if self.info.kind == "class":
            conditions = source.conditions(torch.tensor([class_label(self.info, request.prompt)]))
            encoded = Encoded(conditions.conditional, conditions.unconditional)
        else:
            encoded = source.encode([request.prompt], request.negative_prompt)
            self._log_cuts(request)
        unconditional = None
        if request.guidance != 1:
            if encoded.unconditional is None:
                raise UsageError(f"{self.info.name} takes no guidance; it must be 1")
            unconditional = self._all_placed(encoded.unconditional)
        conditional = self._all_placed(encoded.conditional)
        return Inputs(conditional, unconditional, self._all_placed(encoded.shared))

    def _placed(self, tensor: Tensor) -> Samples:
        """A tensor where the samples lie: on the graph's device, or an array of the host."""
        if self._device is None:
            return tensor.detach().cpu().numpy()
        return tensor.detach().to(self._device)

    def _all_placed(self, tensors: Mapping[str, Tensor]) -> Arrays:
        return {name: self._placed(tensor) for name, tensor in tensors.items()}

    def _log_cuts(self, request: GenerationRequest) -> None:
        """Log that a prompt is truncated, without its text: prompts are private."""
        texts = [request.prompt, *filter(None, [request.negative_prompt])]
        for cut in find_truncations(self._source.pipeline, texts):
            field = "prompt" if cut.prompt == request.prompt else "negative_prompt"
            fields = {"model": self.info.name, "field": field, "encoder": cut.encoder}
            counts = {"tokens": cut.tokens, "kept": cut.kept}
            logger.warning("prompt cut off", extra={FIELDS: fields | counts})

    @torch.no_grad()
    def denoise(
        self, x: Samples, timestep: Samples, conditional: Arrays, shared: Arrays
    ) -> Samples:
        """x[B, ...], timestep float32[B] -> the prediction `[B, ...]`."""
        conditions = {**conditional, **shared}
        if self._graph is not None:
            return self._graph({self._source.family.sample: x, "timestep": timestep, **conditions})
        values = {name: torch.from_numpy(value) for name, value in conditions.items()}
        arguments = self._source.family.arguments(
            torch.from_numpy(x), torch.from_numpy(timestep), values
        )
        output: Tensor = self._source.denoiser(**arguments, return_dict=False)[0]
        predicted: np.ndarray = output.float().cpu().numpy()
        return predicted

    @torch.no_grad()
    def decode(self, x: Samples) -> np.ndarray:
        """A clean sample `[1, ...]` -> uint8[H,W] or uint8[H,W,3]."""
        with self._lock, quiet_diffusers():
            image = self._decode(torch.from_numpy(x) if isinstance(x, np.ndarray) else x)
        return pixels(image.float().cpu().numpy(), self.info.name)


def device_of_samples(graph: GraphCall | None) -> torch.device | None:
    """Where the samples lie between the steps: with a graph on a GPU provider; None: on the host.

    Engines that trtq opens without onnxruntime take arrays of the host.
    """
    if graph is None or graph.engine.provider not in GPU_PROVIDERS:
        return None
    return torch.device(graph.engine.device) if isinstance(graph.engine, OrtSession) else None


def _sizes(source: LoadedPipeline) -> Sizes | None:
    """The sizes that the denoiser accepts; for torch, up to twice the default height and width.

    The result is None if the denoiser accepts one size only.
    """
    if isinstance(source.denoiser, EngineDenoiser):
        return Sizes.of_graph(source.denoiser.engine.metadata, source.cell_pixels)
    if isinstance(source.denoiser, GpuDenoiser):
        return None  # Each shape needs a CUDA graph, which occupies memory.
    takes_size = "height" in inspect.signature(source.pipeline.__call__).parameters
    if not (source.family.free_size and takes_size):
        return None
    multiple_of = source.cell_pixels * source.coarsest
    config: Any = source.denoiser.config
    # Stable Diffusion 3 reads the positions of its patches from a table of this size.
    max_cells = config.get("pos_embed_max_size")
    height, width = (
        2 * side if max_cells is None else min(2 * side, max_cells * multiple_of)
        for side in source.image_size
    )
    return Sizes((multiple_of, multiple_of), (height, width), multiple_of)


def _info(source: LoadedPipeline, name: str, provider: str, artefact: Opened) -> ModelInfo:
    folder = source.folder
    kind = "class" if source.classes is not None else "none" if source.prompts is None else "text"
    if kind == "none" and source.own_call.first(source.image_size).inputs:
        raise UsageError(
            f"{type(source.pipeline).__name__} with a {source.model_class} cannot be served: the "
            "inputs of its denoiser are unknown"
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
        takes_negative_prompt=kind == "text"
        and takes_negative(source.pipeline, source.denoiser_name),
    )
    if kind != "class" or source.classes is None:
        return info
    label = torch.zeros(1, dtype=torch.long)
    return replace(info, takes_guidance=source.conditions(label).unconditional is not None)
