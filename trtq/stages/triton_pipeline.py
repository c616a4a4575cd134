"""The pipeline inside a Triton Inference Server; its graphs are other models of the server."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtq.engine.base import Engine
from trtq.engine.triton import ServedGraph, TritonEngine
from trtq.errors import ArtefactError, UsageError
from trtq.evaluate.images import Subjects, draw
from trtq.stages.load import engine_source

__all__ = ["SETTINGS_NAME", "PackagedPipeline", "Settings"]

SETTINGS_NAME = "trtq.json"


@dataclass(frozen=True)
class Settings:
    """What the pipeline's model knows beside the parts in its folder.

    Attributes:
        denoiser: name of that component.
        size: image size that the graphs take, or a range.
        steps: denoising steps where a request names none.
        guidance: where a request names none; None: what the model is meant for.
        most_images: of one call of the graphs.
        graphs: `ServedGraph.to_json` by component.
    """

    denoiser: str
    size: str | None
    steps: int
    guidance: float | None
    most_images: int
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
        try:
            return cls(**json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            raise ArtefactError(f"cannot read {folder / SETTINGS_NAME}: {err}") from err


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
            return TritonEngine(graphs[name], backend_utils) if name in graphs else None

        self.source = engine_source(folder, self.settings.denoiser, self.settings.size, open_graph)

    def draw(
        self,
        subjects: list[str] | list[int] | int,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Draw what a request asks for, as `trtq generate` would.

        Args:
            subjects: a prompt or a class for each image; a number of images for a model of neither.
            seed: image i of a seed is the same in every request.
            steps: denoising steps.
            guidance: classifier-free guidance.

        Returns:
            uint8[B,H,W,C].

        Raises:
            TrtqError: the request cannot be fulfilled.
        """
        if seed < 0:
            raise UsageError(f"the seed must be 0 or more, got {seed}")
        images = draw(
            self.source,
            self._subjects(subjects),
            steps=self.settings.steps if steps is None else steps,
            seed=seed,
            guidance=self.settings.guidance if guidance is None else guidance,
            batch=self.settings.most_images,
        )
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())

    def _subjects(self, given: list[str] | list[int] | int) -> Subjects:
        if isinstance(given, int):
            if given < 1:
                raise UsageError(f"the number of images must be at least 1, got {given}")
            return Subjects(given)
        if not given:
            raise UsageError("a request needs at least one image")
        if self.source.prompts is not None:
            return Subjects(len(given), prompts=[str(one) for one in given])
        return Subjects(len(given), classes=torch.tensor([int(one) for one in given]))
