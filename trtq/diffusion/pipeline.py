"""Opening a diffusers checkpoint: a folder, a shipped model or a hub id."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.diffusion.checkpoint import load_pipeline, one_line
from trtq.diffusion.encode import (
    EMBEDDED_GUIDANCE,
    Encoded,
    check_inputs,
    class_conditions,
    class_count,
    encode_prompts,
    encodes_text,
)
from trtq.diffusion.families import Family, family_named
from trtq.diffusion.layout import (
    INDEX_NAME,
    check_null_class,
    parse_size,
    read_json,
    read_null_class,
)
from trtq.diffusion.needs import check_needs
from trtq.diffusion.prepared import plain_pipeline
from trtq.diffusion.prompts import PromptSet, load_prompts
from trtq.diffusion.quiet import quiet_diffusers
from trtq.diffusion.sampling import Conditions
from trtq.diffusion.schedule import (
    KNOWN_PIPELINES,
    NoiseSchedule,
    Stepping,
    check_steps,
    set_timesteps,
    stepping_of,
)
from trtq.diffusion.shipped import shipped_model, shipped_models
from trtq.diffusion.weights import single_file_refusal
from trtq.errors import ArtefactError, QuantizationError, UsageError
from trtq.quant.stand_in import StandIn
from trtq.torch_settings import with_own_settings

__all__ = [
    "DENOISERS",
    "LoadedPipeline",
    "load_source",
    "resolve_model",
    "wrap_pipeline",
]

DENOISERS = ("unet", "transformer")
_LARGEST = 8192
"""Limit of the cells along one side of a latent, as in `trtq.diffusion.checkpoint`."""
_WITHOUT_LABELS = ("DDIMPipeline", "DDPMPipeline")
"""Pipelines of diffusers that hold a `UNet2DModel` and a scheduler and pass no class."""
_ENCODE_BATCH = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PROMPT_GROUP = 4
_MAX_ENLARGED = 16
"""Times the model's own height or width; at twice that, pictures fall apart already."""


class LoadedPipeline:
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
        self._size: tuple[int, int] | None = None
        self._encoded: dict[int, Encoded] = {}
        if prompts is None and encodes_text(pipeline):
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
    def family(self) -> Family:
        """How the denoiser is called."""
        return family_named(self.model_class)

    @property
    def classes(self) -> int | None:
        """Number of classes, "no class" left out; None for a model without classes."""
        return class_count(self.pipeline)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents, or of the images of a model without latents."""
        return self._own_size if self._size is None else self._size

    @property
    def resized(self) -> bool:
        """Whether another size than the model's own was asked for."""
        return self._size is not None and self._size != self._known_size

    @property
    def _known_size(self) -> tuple[int, int] | None:
        """The model's own size; None where its configuration does not tell."""
        size = getattr(self.denoiser.config, "sample_size", None)
        if size is None:
            size = getattr(self.pipeline, "default_sample_size", None)
        if size is None:
            return None
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(s, int) and 1 <= s <= _LARGEST for s in sides):
            raise UsageError(
                f"{self.name}: the sample_size of its {self.denoiser_name} is one number or two, "
                f"each 1 .. {_LARGEST}, got {one_line(repr(size))}"
            )
        return sides[0], sides[1]

    @property
    def _own_size(self) -> tuple[int, int]:
        size = self._known_size
        if size is None:
            raise UsageError(
                f"{self.name} does not tell its image size (sample_size is null in "
                f"{self.denoiser_name}/config.json); say it with --size HEIGHTxWIDTH"
            )
        return size

    def resize(self, size: str) -> None:
        """Work on images of this size from now on.

        Args:
            size: `HEIGHTxWIDTH` in pixels.

        Raises:
            UsageError: it is not understood, or the model cannot draw it.
        """
        self._size = self.latents_of(size)
        self.forget_prompts()

    def sized(self, size: str) -> LoadedPipeline:
        """The same pipeline, working on images of this size; this source stays as it is.

        Args:
            size: `HEIGHTxWIDTH` in pixels.

        Raises:
            UsageError: it is not understood, or the model cannot draw it.
        """
        other = copy(self)
        other._encoded = {}
        other.resize(size)
        return other

    def latents_of(self, size: str) -> tuple[int, int]:
        """Height and width of the latents of images of `HEIGHTxWIDTH` pixels.

        Raises:
            UsageError: it is not understood, or the model cannot draw it.
        """
        height, width = parse_size(size)
        step = self.cell_pixels * self.coarsest
        if height < step or width < step or height % step or width % step:
            raise UsageError(
                f"{self.name} cannot draw {size} pixels; height and width must be multiples of "
                f"{step}"
            )
        own = self._known_size
        most = [_MAX_ENLARGED * side * self.cell_pixels for side in own or ()]
        if most and (height > most[0] or width > most[1]):
            raise UsageError(
                f"{self.name} cannot draw {size} pixels; choose HEIGHTxWIDTH up to {most[0]}x{most[1]}, "
                f"{_MAX_ENLARGED} times the model's own"
            )
        return height // self.cell_pixels, width // self.cell_pixels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = self.latent_size
        return height * self.cell_pixels, width * self.cell_pixels

    @property
    def cell_pixels(self) -> int:
        """Pixels along one side of a latent's cell; 1 for a model without latents."""
        for name in ("vae", "vqvae"):
            autoencoder = getattr(self.pipeline, name, None)
            if autoencoder is not None:
                return int(2 ** (len(autoencoder.config.block_out_channels) - 1))
        return 1

    @property
    def coarsest(self) -> int:
        """Latent cells along one side of a cell of the denoiser's coarsest level."""
        config: Any = self.denoiser.config
        if self.packed:
            return 2
        if getattr(config, "patch_size", None) is not None:
            return int(config.patch_size)
        return int(2 ** (len(config.block_out_channels) - 1))

    @property
    def packed(self) -> bool:
        """Whether the denoiser takes latents as a sequence of 2 x 2 patches."""
        return self.model_class == "FluxTransformer2DModel"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one denoiser input: (C, H, W), or (S, C) where latents are a sequence."""
        height, width = self.latent_size
        config: Any = self.denoiser.config
        channels = int(config.in_channels)
        if self.packed:
            return (height // 2) * (width // 2), channels
        return channels, height, width

    @property
    def guidance(self) -> float:
        """The classifier-free guidance that the model is meant for; 1 is none."""
        if self.prompts is None or self.embedded_guidance is not None:
            return 1.0
        return self.prompts.guidance

    @property
    def embedded_guidance(self) -> float | None:
        """The guidance that the denoiser is told as an input; None where it is not."""
        return EMBEDDED_GUIDANCE if self.packed else None

    @property
    def gives_raw_images(self) -> bool:
        """Whether the pipeline's tensors lie in [-1, 1] and not, as usual, in [0, 1]."""
        return hasattr(self.pipeline, "classes")

    def _calibration_prompt(self, index: int) -> tuple[Encoded, int]:
        """A group of calibration prompts as the pipeline encodes them, and the place of one in it.

        Few prompts are drawn of many, so they are encoded when they are needed. Groups are fixed: what a
        prompt becomes does not depend, in its last bits, on what was drawn before.
        """
        assert self.prompts is not None
        group, place = divmod(index, _PROMPT_GROUP)
        if group not in self._encoded:
            first = group * _PROMPT_GROUP
            chosen = self.prompts.calibration[first : first + _PROMPT_GROUP]
            self._encoded[group] = self.encode(list(chosen))
        return self._encoded[group], place

    def forget_prompts(self) -> None:
        """Encode the prompts again when they are needed: the text encoder or the size has changed."""
        self._encoded.clear()

    def encode(self, prompts: list[str], negative: str | None = None) -> Encoded:
        """What the pipeline makes of prompts, on the CPU.

        Args:
            prompts: at least one.
            negative: what the images are not to show; None: see `encode_prompts`.

        Raises:
            UsageError: this kind of pipeline is not supported, or takes no negative prompt.
        """
        size = self.latent_size
        parts = [
            encode_prompts(self.pipeline, prompts[first : first + _ENCODE_BATCH], size, negative)
            for first in range(0, len(prompts), _ENCODE_BATCH)
        ]
        joined = {
            name: torch.cat([part.conditional[name] for part in parts])
            for name in parts[0].conditional
        }
        return Encoded(joined, parts[0].unconditional, parts[0].shared)

    @property
    def image_tokens(self) -> int | None:
        """Length of the sequence that a transformer makes of the latents; None for a UNet."""
        patch = 2 if self.packed else getattr(self.denoiser.config, "patch_size", None)
        height, width = self.latent_size
        return None if patch is None else (height // patch) * (width // patch)

    def timesteps(self, steps: int) -> list[float]:
        """What the denoiser is told in `steps` steps of the pipeline's own scheduler, noisiest first."""
        return self.schedule(steps).timesteps.tolist()

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler.

        Raises:
            UsageError: it has none.
        """
        found = getattr(self.pipeline, "scheduler", None)
        if not hasattr(found, "set_timesteps") or not hasattr(found, "config"):
            raise UsageError(f"{type(self.pipeline).__name__} has no scheduler of diffusers")
        return found

    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise levels of `steps` steps of the pipeline's own scheduler.

        Its timesteps are those that the pipeline itself passes to its denoiser.

        Raises:
            UsageError: the number of steps is out of range, the scheduler is not one whose noise levels
                are known, or it is not known what this kind of pipeline does with it.
        """
        return NoiseSchedule.of(
            self.scheduler,
            steps,
            tokens=self.image_tokens,
            timestep_scale=self.family.timestep_scale,
            stepping=self._stepping(),
            channels=self._channels,
        )

    def stepped_scheduler(self, steps: int) -> Any:
        """A fresh scheduler of the pipeline's kind, its steps set as the pipeline sets them.

        Raises:
            UsageError: it cannot go so many steps, or it is not known how the pipeline sets them.
        """
        self.check_steps(steps)
        return set_timesteps(self.scheduler, steps, self.image_tokens, self._stepping())

    def check_steps(self, steps: int) -> None:
        """Nothing, if the pipeline can draw in so many steps; its scheduler may be of any kind.

        Raises:
            UsageError: the number of steps is out of range, or the scheduler breaks on it.
        """
        tokens, channels = self.image_tokens, self._channels
        check_steps(self.scheduler, steps, tokens, self._stepping(), channels)

    @property
    def _channels(self) -> int:
        """Channels of one sample as the scheduler sees it."""
        config: Any = self.denoiser.config
        return int(config.in_channels)

    def _stepping(self) -> Stepping:
        found = stepping_of(self.pipeline)
        if found is None:
            raise UsageError(
                f"{type(self.pipeline).__name__} is not supported: it is not known which timesteps it "
                f"passes to its denoiser; supported are {', '.join(KNOWN_PIPELINES)}"
            )
        return found

    def draw_conditions(self, count: int, generator: torch.Generator) -> Conditions:
        """Conditions for `count` images: classes in equal numbers, shuffled; prompts; or none.

        Raises:
            UsageError: this kind of pipeline is not supported.
        """
        if self.classes is not None:
            labels = torch.arange(count) % self.classes
            return self.conditions(labels[torch.randperm(count, generator=generator)])
        if self.prompts is None:
            if self.model_class == "UNet2DModel":
                self._check_unlabelled()
                return Conditions({}, family=self.family)
            raise UsageError(
                f"{type(self.pipeline).__name__} with a {self.model_class} is not supported"
            )
        total = len(self.prompts.calibration)
        chosen = torch.randint(total, (count,), generator=generator)
        rows = [self._calibration_prompt(index) for index in chosen.tolist()]
        first = rows[0][0]
        unconditional = first.unconditional and {
            name: value.expand(count, *value.shape[1:])
            for name, value in first.unconditional.items()
        }
        conditional = {
            name: torch.stack([encoded.conditional[name][place] for encoded, place in rows])
            for name in first.conditional
        }
        return Conditions(conditional, unconditional, first.shared, self.family)

    def _check_unlabelled(self) -> None:
        config: Any = self.denoiser.config
        for name in ("num_class_embeds", "class_embed_type"):
            if getattr(config, name, None) is not None:
                raise UsageError(
                    f"the UNet2DModel has {name}={getattr(config, name)!r}, and "
                    f"{type(self.pipeline).__name__} passes no class; a UNet with num_class_embeds is "
                    f"taken in a {' or '.join(_WITHOUT_LABELS)}"
                )

    def conditions(self, labels: Tensor) -> Conditions:
        """Conditions for images of these classes, labels[B].

        Raises:
            UsageError: a label is not one of the model's classes.
        """
        found: Conditions = class_conditions(self.pipeline, labels)
        return replace(found, family=self.family)


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
    folder, name = Path(model), str(model)
    if "\0" in name:
        raise ArtefactError(f"the model's name {name!r} holds a NUL")
    try:
        is_folder, there = folder.is_dir(), folder.exists()
        if (is_folder and not (folder / INDEX_NAME).is_file()) or (there and not is_folder):
            raise ArtefactError(_no_pipeline(folder))
    except OSError as err:
        raise ArtefactError(f"cannot read {one_line(repr(name))}: {err.strerror}") from err
    if is_folder:
        return folder
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name:
        return name
    raise ArtefactError(
        f"there is no model {one_line(repr(name))}: not a folder, not a hub id (owner/name), and "
        f"not one that ships with trtq ({', '.join(shipped_models()) or 'none'})"
    )


def _no_pipeline(path: Path) -> str:
    """Why a file or folder that is there is no pipeline's, and what to do."""
    single = None if (path / "config.json").is_file() else single_file_refusal(path)
    if single is not None:
        return single
    if not path.is_dir():
        return f"{path} is a file and no pipeline; give the folder that holds its {INDEX_NAME}"
    if (path / "config.json").is_file():
        named = read_json(path / "config.json").get("_class_name")
        return (
            f"{path} is the folder of one component ({named or 'its config.json names no class'}) "
            f"and holds no {INDEX_NAME}; give the folder of the whole pipeline, with scheduler, "
            "text encoders and autoencoder"
        )
    inside = sorted(p.parent.name for p in path.glob(f"*/{INDEX_NAME}"))
    hint = f"; {inside[0]!r} inside it does" if inside else ""
    return f"{path} holds no {INDEX_NAME}; give the folder of a whole pipeline{hint}"


def wrap_pipeline(pipeline: Any, null_class: int | None = None, scheduler: Any = None) -> Any:
    """Give a class-conditional `UNet2DModel` the pipeline that can call it; others stay.

    Those that stay are also pipelines of another kind, whose sampler is their own.

    Args:
        pipeline: any.
        null_class: the label that stands for "no class".
        scheduler: to draw with, where the pipeline has put another in its place; None: the pipeline's.

    Raises:
        ArtefactError: the model does not know the label.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None or getattr(unet.config, "num_class_embeds", None) is None:
        return pipeline
    if "encoder_hid_dim" in unet.config or hasattr(pipeline, "classes"):
        return pipeline
    if type(pipeline).__name__ not in _WITHOUT_LABELS:
        return pipeline
    from trtq.diffusion.class_conditional import ClassConditionalPipeline

    check_null_class(null_class, int(unet.config.num_class_embeds))
    chosen = pipeline.scheduler if scheduler is None else scheduler
    return ClassConditionalPipeline(unet, chosen, null_class)


@with_own_settings
def load_source(model: str | Path | Any) -> LoadedPipeline:
    """Load a pipeline in float32, from safetensors only; every tensor is checked.

    Args:
        model: a diffusers folder, the name of a shipped model, a hub id, or a pipeline object. An
            object is not changed: its models are built again, see `trtq.diffusion.prepared`.

    Raises:
        ArtefactError: it cannot be found or read, or its weights do not fit.
        QuantizationError: it has no denoiser, or weights that are no finite numbers.
        UsageError: its denoiser needs inputs that trtq does not pass, or the object was changed in a way
            that would be lost.
    """
    if not isinstance(model, str | Path):
        return _object_source(model)
    place = resolve_model(model)
    folder = place if isinstance(place, Path) else None
    pipeline = load_pipeline(folder if folder is not None else _downloaded(str(place)))
    name = find_denoiser(pipeline)
    pipeline = wrap_pipeline(pipeline, read_null_class(folder) if folder is not None else None)
    pipeline.set_progress_bar_config(disable=True)
    check_needs(pipeline, name, str(model))
    return LoadedPipeline(str(model), folder, pipeline, name)


def _object_source(pipeline: Any) -> LoadedPipeline:
    """A pipeline object; one that trtq itself has made low-bit stays as it is."""
    if isinstance(pipeline, nn.Module):
        raise UsageError(
            f"a whole pipeline is needed, got the model {type(pipeline).__name__} alone; put it "
            "into one, or give the pipeline's folder"
        )
    name = find_denoiser(pipeline)
    if not isinstance(getattr(pipeline, name), StandIn):
        # Before it is built again as well: what an adapter has added makes no plain model.
        check_inputs(pipeline)
        pipeline = wrap_pipeline(plain_pipeline(pipeline))
        check_needs(pipeline, name, type(pipeline).__name__)
    return LoadedPipeline(type(pipeline).__name__, None, pipeline, name)


def _downloaded(name: str) -> Path:
    """The folder of a hub id, in the hub's own cache.

    Raises:
        ArtefactError: there is no such repository, or it cannot be reached.
    """
    from diffusers import DiffusionPipeline

    try:
        with quiet_diffusers():
            found = DiffusionPipeline.download(name, use_safetensors=True)
    # The hub's client and diffusers raise what their network libraries do.
    except Exception as err:
        raise ArtefactError(
            f"cannot load the pipeline {name!r} from the hub ({one_line(err)}); check the name and "
            "the connection, or download it (`hf download`) and give its folder"
        ) from err
    return Path(found)
