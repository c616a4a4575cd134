"""The pipeline inside a Triton Inference Server; its graphs are other models of the server."""

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
"""Of one request, so that none holds the pipeline for hours."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Settings:
    """What the pipeline's model knows beside the parts in its folder.

    Attributes:
        denoiser: name of that component.
        size: image size that the graphs take, or a range.
        steps: denoising steps where a request names none.
        guidance: where a request names none; None: what the model is meant for.
        max_images: of one call of the graphs.
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
        """Into the folder of the parts."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / SETTINGS_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """From the folder of the parts.

        Raises:
            ArtefactError: there are none that can be read.
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
        folder: of the parts.
        backend_utils: the server's module `triton_python_backend_utils`.

    Raises:
        ArtefactError: a part is missing, or cannot be read.
    """

    def __init__(self, folder: Path, backend_utils: Any) -> None:
        self.settings = Settings.read(folder)
        graphs = {
            name: ServedGraph.from_json(found) for name, found in self.settings.graphs.items()
        }

        def open_graph(name: str) -> Engine | None:
            if name not in graphs:
                return None
            return TritonEngine(graphs[name], backend_utils, self._go_on)

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
        """Draw what a request asks for, as `trtq generate` would.

        Args:
            conditioning: a prompt or a class for each image; a number of images for a model of neither.
            seed: image i of a seed is the same in every request.
            steps: denoising steps.
            guidance: classifier-free guidance.
            cancelled: asked before every call of a graph.

        Returns:
            uint8[B,H,W,C].

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
                self._subjects(conditioning),
                steps=self.settings.steps if steps is None else steps,
                seed=seed,
                guidance=self.settings.guidance if guidance is None else guidance,
                batch=self.settings.max_images,
            )
        finally:
            self._cancelled = _never  # It holds on to the server's request.
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    def _go_on(self) -> None:
        if self._cancelled():
            raise CancelledError("the client cancelled the request")

    def _subjects(self, given: list[str] | list[int] | int | None) -> Conditioning:
        name = request_input(self.source)
        if given is None:
            raise UsageError(f"the request has no input {name!r}")
        count = given if isinstance(given, int) else len(given)
        if not 1 <= count <= _MAX_IMAGES:
            raise UsageError(
                f"a request may ask for 1 .. {_MAX_IMAGES} images, {name!r} asks for {count}"
            )
        if isinstance(given, int):
            return Conditioning(given)
        if self.source.prompts is not None:
            return Conditioning(count, prompts=[str(one) for one in given])
        return Conditioning(count, classes=torch.tensor([int(one) for one in given]))


def request_input(source: LoadedPipeline) -> str:
    """Name of the input that says what to draw."""
    if source.prompts is not None:
        return "prompt"
    return "count" if source.classes is None else "class_label"
