"""The pipeline in a Triton Inference Server, where other models run its graphs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from trtq.diffusion.pipeline import LoadedPipeline
from trtq.documents import explain_first, read_object
from trtq.engine.base import Engine
from trtq.errors import ArtefactError, CancelledError, UsageError
from trtq.pipelines.draw import Conditioning, draw
from trtq.pipelines.open import engine_source
from trtq.serve.triton.engine import ServedGraph, TritonEngine

__all__ = ["SETTINGS_NAME", "PackagedPipeline", "Settings", "request_input"]

SETTINGS_NAME = "trtq.json"
_MAX_IMAGES = 100
"""Maximum number of images per request, so that no request occupies the pipeline for hours."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Settings:
    """The settings of the pipeline's model, stored with the components in its folder.

    Attributes:
        denoiser: name of the denoiser's component.
        size: image size that the graphs accept, or a range of sizes.
        steps: default number of denoising steps.
        guidance: default classifier-free guidance; None: the model's default.
        max_images: maximum number of images per call of the graphs.
        graphs: `ServedGraph.to_json` by component.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    denoiser: str
    size: str | None
    steps: int
    guidance: float | None
    max_images: int
    graphs: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write the settings into the folder of the components."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / SETTINGS_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read the settings from the folder of the components.

        Raises:
            ArtefactError: the settings are missing or malformed.
        """
        path = folder / SETTINGS_NAME
        try:
            return _SETTINGS.validate_python(read_object(path))
        except ValidationError as err:
            raise ArtefactError(f"cannot read {path}: {explain_first(err)}") from err


_SETTINGS = TypeAdapter(Settings)


class PackagedPipeline:
    """Draws images for requests.

    Args:
        folder: folder of the components.
        backend_utils: module `triton_python_backend_utils` of the server.

    Raises:
        ArtefactError: a component is missing or cannot be read.
    """

    def __init__(self, folder: Path, backend_utils: Any) -> None:
        self.settings = Settings.read(folder)
        graphs = {
            name: ServedGraph.from_json(graph) for name, graph in self.settings.graphs.items()
        }

        def open_graph(name: str) -> Engine | None:
            if name not in graphs:
                return None
            return TritonEngine(graphs[name], backend_utils, self._check_cancelled)

        self._cancelled: Callable[[], bool] = _never
        self.source = engine_source(folder, self.settings.denoiser, self.settings.size, open_graph)

    def draw(
        self,
        conditioning: list[str] | list[int] | int | None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        cancelled: Callable[[], bool] = _never,
    ) -> np.ndarray:
        """Draw the images of a request, exactly as `trtq generate` does.

        Args:
            conditioning: prompt or class of each image, or the number of images of a model without
                conditions.
            seed: seed of the initial noise; image i of a seed is the same in every request.
            steps: number of denoising steps; None: the default of the settings.
            guidance: classifier-free guidance; None: the default of the settings.
            cancelled: function called before each graph call; returns whether the client has cancelled.

        Returns:
            The images, uint8[B,H,W,C].

        Raises:
            TrtqError: the request cannot be fulfilled.
        """
        if seed < 0:
            raise UsageError(f"the seed must be 0 or more, got {seed}")
        if guidance is not None and not 0 <= guidance < math.inf:
            raise UsageError(f"guidance must be a number of 0 or more, got {guidance}")
        self._cancelled = cancelled
        try:
            images = draw(
                self.source,
                self._conditioning(conditioning),
                steps=self.settings.steps if steps is None else steps,
                seed=seed,
                guidance=self.settings.guidance if guidance is None else guidance,
                batch=self.settings.max_images,
            )
        finally:
            self._cancelled = _never  # The callback holds a reference to the request.
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise CancelledError("the client cancelled the request")

    def _conditioning(self, given: list[str] | list[int] | int | None) -> Conditioning:
        name = request_input(self.source)
        if given is None:
            raise UsageError(f"the request has no input {name!r}")
        count = given if isinstance(given, int) else len(given)
        if not 1 <= count <= _MAX_IMAGES:
            raise UsageError(
                f"a request may contain 1 .. {_MAX_IMAGES} images; {name!r} has {count}"
            )
        if isinstance(given, int):
            return Conditioning(given)
        if self.source.prompts is not None:
            return Conditioning(count, prompts=[str(prompt) for prompt in given])
        return Conditioning(count, classes=torch.tensor([int(label) for label in given]))


def request_input(source: LoadedPipeline) -> str:
    """Name of the conditioning input: `prompt`, `class_label` or `count`."""
    if source.prompts is not None:
        return "prompt"
    return "count" if source.classes is None else "class_label"
