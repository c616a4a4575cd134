"""A model of an ONNX folder that runs without torch: a UNet in pixel space, with DDIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtq.artefact.opened import DEFAULT_STEPS, OnnxFolder
from trtq.checkpoint.layout import (
    check_null_class,
    class_names,
    parse_size,
    read_index,
    read_json,
    read_null_class,
    read_scheduler,
)
from trtq.documents import shown
from trtq.engine.open import open_engine
from trtq.engine.openvino import OpenVinoEngine
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.seeds import seeded_normal
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
from trtq.serve.models.solver import Ddim

__all__ = ["TorchFreeModel", "pixels"]

_MIN_VALUES = 16
_CHEAP_VALUES = 1 << 12
"""Maximum number of values in an image whose noise and PNG file take little time."""
_MAX_CHANNELS = 4096
_MAX_CLASSES = 1 << 24


class TorchFreeModel(ImageModel):
    """The graph of a `UNet2DModel` in pixel space.

    Args:
        artefact: a verified ONNX folder that `serves` accepts.
        name: model name used in requests.
        provider: execution provider.
        threads: number of threads per operator; None: the number of cores.
        shapes: maximum number of batch sizes in use at once.

    Raises:
        UsageError: the provider is not available.
        ArtefactError: a file cannot be read.
    """

    def __init__(
        self,
        artefact: OnnxFolder,
        name: str,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        shapes: int = 2,
    ) -> None:
        folder, manifest = artefact.folder, artefact.manifest
        config = read_json(folder / artefact.denoiser / "config.json")
        graph = folder / artefact.denoiser / "model.onnx"
        self._graph = GraphCall(open_engine(graph, provider, threads, shapes=shapes))
        manifest.check_graph(self._graph.engine.metadata)
        self.fixed_shapes = provider == OpenVinoEngine.provider
        self._ddim = Ddim(_scheduler_config(folder))
        self._null_class = read_null_class(folder)
        self._shape = _sample_shape(config, artefact)
        info = _info(artefact, name, provider, config, self._ddim, self._null_class)
        sizes = None if self.fixed_shapes else Sizes.of_graph(self._graph.engine.metadata)
        self.info = replace(info, sizes=sizes)
        largest = self._shape[1:] if sizes is None else sizes.largest
        self.cheap_codec = self._shape[0] * math.prod(largest) <= _CHEAP_VALUES

    @staticmethod
    def serves(artefact: OnnxFolder) -> bool:
        """Whether this class can serve the folder; otherwise `PipelineModel` can."""
        folder = artefact.folder
        index = read_index(folder)
        config = read_json(folder / artefact.denoiser / "config.json")
        return (
            config.get("_class_name") == "UNet2DModel"
            and not any(part in index for part in ("vae", "vqvae"))
            and Ddim.knows(_scheduler_config(folder))
            and math.prod(_sample_shape(config, artefact)) >= _MIN_VALUES
        )

    def starts(self, request: GenerationRequest) -> Sequence[InitialState]:
        """The images of a request before their first denoising step."""
        solver = self._ddim.solver(request.steps)
        inputs = self._inputs(request)
        channels, *default_size = self._shape
        shape = (1, channels, *(request.size or default_size))
        return [
            InitialState(
                seeded_normal(shape, request.seed, "image", index), inputs, solver, request.guidance
            )
            for index in range(request.count)
        ]

    def _inputs(self, request: GenerationRequest) -> Inputs:
        if not self.info.classes:
            if request.prompt.strip():
                raise UsageError(f"{self.info.name} takes no prompt; leave it empty")
            return Inputs({})
        label = np.array([class_label(self.info, request.prompt)])
        if request.guidance == 1:
            return Inputs({"class_labels": label})
        if self._null_class is None:
            raise UsageError(f"{self.info.name} has no label for 'no class', so guidance must be 1")
        return Inputs({"class_labels": label}, {"class_labels": np.array([self._null_class])})

    def denoise(
        self, x: np.ndarray, timestep: np.ndarray, conditional: Arrays, shared: Arrays
    ) -> np.ndarray:
        """x[B,C,H,W], timestep float32[B] -> the prediction `[B,C,H,W]`."""
        predicted: np.ndarray = self._graph({"sample": x, "timestep": timestep, **conditional})
        return predicted

    def decode(self, x: np.ndarray) -> np.ndarray:
        """A clean image `[1,C,H,W]` in [-1, 1] -> uint8[H,W] or uint8[H,W,3]."""
        return pixels(x, self.info.name)


def pixels(x: np.ndarray, name: str) -> np.ndarray:
    """An image `[1,C,H,W]` in [-1, 1] -> uint8[H,W] if C is 1, else uint8[H,W,3].

    Args:
        x: the image.
        name: name of the model, used in messages.

    Raises:
        NonFiniteError: the image holds NaN or infinity.
    """
    if not np.isfinite(x).all():
        raise NonFiniteError(f"{name} drew an image that holds NaN or infinity")
    values = np.rint((x[0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return values[0] if len(values) == 1 else np.moveaxis(values[:3], 0, -1)


def _scheduler_config(folder: Path) -> dict[str, Any]:
    return read_scheduler(folder)


def _sample_shape(config: dict[str, Any], artefact: OnnxFolder) -> tuple[int, int, int]:
    """Channels, height and width; the minimum size if the graph accepts several sizes."""
    channels = _whole(config, "in_channels", 1, _MAX_CHANNELS)
    return channels, *parse_size(artefact.smallest_size or "")


def _whole(config: dict[str, Any], key: str, low: int, high: int) -> int:
    """Read an integer from `low` to `high` in the denoiser's configuration.

    Raises:
        ArtefactError: the value is not an integer in this range.
    """
    value = config.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ArtefactError(
            f"the denoiser's config.json: {key} must be a number from {low} to {high}, got "
            f"{shown(value)}"
        )
    return value


def _info(
    artefact: OnnxFolder,
    name: str,
    provider: str,
    config: dict[str, Any],
    ddim: Ddim,
    null_class: int | None,
) -> ModelInfo:
    count = 0
    if config.get("num_class_embeds") is not None:
        embeds = _whole(config, "num_class_embeds", 1, _MAX_CLASSES)
        check_null_class(null_class, embeds)
        count = embeds - (null_class is not None)
    _, height, width = _sample_shape(config, artefact)
    return ModelInfo(
        name=name,
        kind="class" if count else "none",
        classes=tuple(class_names(artefact.folder, count)),
        image_size=(height, width),
        steps=artefact.steps or DEFAULT_STEPS,
        max_steps=ddim.trained,
        guidance=artefact.guidance or 1.0,
        takes_guidance=null_class is not None,
        provider=provider,
        bits=artefact.bits if artefact.low_bit else None,
    )
