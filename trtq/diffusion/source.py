"""Opening a diffusers checkpoint: a folder, a shipped model or a hub id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.prompts import PromptSet, load_prompts
from trtq.diffusion.sampling import Conditions
from trtq.diffusion.schedule import inference_timesteps
from trtq.diffusion.shipped import shipped_model, shipped_models
from trtq.errors import ArtefactError, QuantizationError, UsageError

__all__ = ["DENOISERS", "Source", "load_source", "resolve_model", "wrap_pipeline"]

INDEX_NAME = "model_index.json"
CLASSES_NAME = "classes.json"
_LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError)
DENOISERS = ("unet", "transformer")
_ENCODE_BATCH = 64


class Source:
    """A loaded pipeline and where it came from.

    Attributes:
        name: as the user gave it.
        folder: its files, or None for a hub id or a pipeline object.
        pipeline: the diffusers pipeline, in float32.
        denoiser_name: `unet` or `transformer`.
        prompts: of a text-to-image model; None for others.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        pipeline: Any,
        denoiser_name: str,
        prompts: PromptSet | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.pipeline = pipeline
        self.denoiser_name = denoiser_name
        self.prompts = prompts
        if prompts is None and hasattr(pipeline, "encode_prompt"):
            self.prompts = load_prompts(folder)

    @property
    def denoiser(self) -> nn.Module:
        """The model that predicts the noise."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    def model(self) -> Any:
        """Diffusers' own model: the denoiser, or what is inside a quantised one."""
        return getattr(self.denoiser, "denoiser", self.denoiser)

    @property
    def model_class(self) -> str:
        """Name of diffusers' class of the denoiser, also where an engine stands in its place."""
        return str(getattr(self.denoiser, "model_class", type(self.model)).__name__)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one denoiser input, (C, H, W)."""
        config: Any = self.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)

    @property
    def guidance(self) -> float:
        """The classifier-free guidance that the model is meant for; 1 is none."""
        return 1.0 if self.prompts is None else self.prompts.guidance

    @property
    def tokens(self) -> int | None:
        """Length of the text conditions; None for a model without text."""
        if self.prompts is None:
            return None
        return int(self.pipeline.tokenizer.model_max_length)

    @cached_property
    def _encoded(self) -> Tensor:
        """Encoded calibration prompts, and last the empty one, `[P + 1, S, D]`."""
        assert self.prompts is not None
        return self.encode([*self.prompts.calibration, ""])

    def forget_prompts(self) -> None:
        """Encode the prompts again when they are needed: the text encoder has changed."""
        self.__dict__.pop("_encoded", None)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """prompts[P] -> text conditions `[P, S, D]`, on the CPU.

        Raises:
            UsageError: the pipeline encodes text in a way that is not supported yet.
        """
        if not isinstance(prompts, list) or hasattr(self.pipeline, "text_encoder_2"):
            raise UsageError(f"{type(self.pipeline).__name__} is not supported yet")
        parts = [
            self.pipeline.encode_prompt(
                prompts[first : first + _ENCODE_BATCH], self.pipeline.text_encoder.device, 1, False
            )[0]
            for first in range(0, len(prompts), _ENCODE_BATCH)
        ]
        return torch.cat(parts).cpu()

    def timesteps(self, steps: int) -> list[float]:
        """The timesteps of the pipeline's own scheduler, noisiest first."""
        return inference_timesteps(self.pipeline.scheduler, steps)

    def draw_conditions(self, count: int, generator: torch.Generator) -> Conditions:
        """Conditions for `count` images: classes in equal numbers, shuffled; prompts; or none.

        Raises:
            UsageError: this kind of pipeline is not supported.
        """
        if hasattr(self.pipeline, "conditions"):
            labels = torch.arange(count) % self.pipeline.classes
            return self.conditions(labels[torch.randperm(count, generator=generator)])
        if self.model_class == "UNet2DModel":
            return Conditions({})
        if self.prompts is None or self.model_class != "UNet2DConditionModel":
            raise UsageError(
                f"{type(self.pipeline).__name__} with a {self.model_class} is not supported yet; "
                "supported are pipelines of a UNet2DModel, with classes or without, and "
                "StableDiffusionPipeline"
            )
        encoded = self._encoded
        chosen = torch.randint(len(encoded) - 1, (count,), generator=generator)
        empty = encoded[-1:].expand(count, -1, -1)
        return Conditions(
            {"encoder_hidden_states": encoded[chosen]}, {"encoder_hidden_states": empty}
        )

    def conditions(self, labels: Tensor) -> Conditions:
        """Conditions for images of these classes, labels[B]."""
        result: Conditions = self.pipeline.conditions(labels)
        return result


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers' and transformers' progress bars off standard error inside the block."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    shown = [log for log in (ours, theirs) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def find_denoiser(pipeline: Any) -> str:
    """The name of the component that predicts the noise.

    Raises:
        QuantizationError: there is none.
    """
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    components = ", ".join(sorted(getattr(pipeline, "components", {}))) or "none"
    raise QuantizationError(
        f"{type(pipeline).__name__} has no denoiser: looked for {' and '.join(DENOISERS)}, "
        f"its components are {components}"
    )


def resolve_model(model: str | Path) -> Path | str:
    """The folder that a model argument means, or the argument itself if it is a hub id.

    Raises:
        ArtefactError: neither a folder with a pipeline, nor a shipped name, nor shaped like an id.
    """
    shipped = shipped_model(str(model))
    if shipped is not None and not Path(model).is_dir():
        return shipped
    folder = Path(model)
    if folder.is_dir():
        if not (folder / INDEX_NAME).is_file():
            raise ArtefactError(
                f"{folder} holds no {INDEX_NAME}; give the folder of a whole pipeline"
            )
        return folder
    name = str(model)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return name
    raise ArtefactError(
        f"there is no model {name!r}: not a folder, not a hub id (owner/name), and not one that "
        f"ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def read_null_class(folder: Path) -> int | None:
    """The label that means "no class", from a folder's `classes.json`; None without one.

    Raises:
        ArtefactError: the file does not hold a label.
    """
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    try:
        null_class = json.loads(path.read_text())["null_class"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    if null_class is not None and not isinstance(null_class, int):
        raise ArtefactError(f"{path}: null_class is a label or null, got {null_class!r}")
    return null_class


def wrap_pipeline(pipeline: Any, null_class: int | None = None) -> Any:
    """Give a class-conditional `UNet2DModel` the pipeline that can call it; others stay."""
    unet = getattr(pipeline, "unet", None)
    if unet is None or getattr(unet.config, "num_class_embeds", None) is None:
        return pipeline
    if "encoder_hid_dim" in unet.config or hasattr(pipeline, "conditions"):
        return pipeline
    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    return ClassConditionalPipeline(unet, pipeline.scheduler, null_class)


def load_source(model: str | Path | Any) -> Source:
    """Load a pipeline in float32, from safetensors only.

    Args:
        model: a diffusers folder, the name of a shipped model, a hub id, or a pipeline object.

    Raises:
        ArtefactError: it cannot be found or read.
        QuantizationError: it has no denoiser.
    """
    if not isinstance(model, str | Path):
        pipeline = wrap_pipeline(model)
        return Source(type(model).__name__, None, pipeline, find_denoiser(pipeline))
    place = resolve_model(model)
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    folder = place if isinstance(place, Path) else None
    try:
        with quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(
                place,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=folder is not None,
            )
    except (*_LOADING_ERRORS, SafetensorError) as err:
        raise ArtefactError(f"cannot load the pipeline {str(model)!r}: {err}") from err
    pipeline = wrap_pipeline(pipeline, read_null_class(folder) if folder is not None else None)
    pipeline.set_progress_bar_config(disable=True)
    return Source(str(model), folder, pipeline, find_denoiser(pipeline))
