"""Text encoders and autoencoders of a pipeline that run on engines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from trtq.checkpoint.components import AUTOENCODERS, TEXT_ENCODERS
from trtq.diffusion.folder import DECODER, ENCODER
from trtq.engine.base import Engine
from trtq.engine.components import EngineAutoencoder, EngineTextEncoder
from trtq.errors import ArtefactError

__all__ = ["load_component", "move_to_graphs"]


def load_component(
    folder: Path, name: str, cls: Any, open_graph: Callable[[str], Engine | None]
) -> nn.Module | None:
    """Load a component that runs on an engine; None if there is no graph of it.

    Args:
        folder: folder of the configurations, in the layout of an ONNX folder.
        name: name of the component in its pipeline.
        cls: class of the component that is replaced.
        open_graph: function from the name of a graph's folder to its engine, or None without a graph.

    Raises:
        ArtefactError: the configuration cannot be read.
    """
    try:
        if name in TEXT_ENCODERS and (engine := open_graph(name)) is not None:
            config = cls.config_class.from_pretrained(folder / name, local_files_only=True)
            return EngineTextEncoder(engine, config)
        if name in AUTOENCODERS and (decoder := open_graph(DECODER)) is not None:
            encoder = open_graph(ENCODER)
            if encoder is None:
                raise ArtefactError(f"{folder} has a {DECODER} and no {ENCODER}")
            frozen = importlib.import_module("diffusers.configuration_utils").FrozenDict
            return EngineAutoencoder(decoder, encoder, frozen(cls.load_config(folder / DECODER)))
    except (OSError, ValueError, KeyError, AttributeError) as err:
        raise ArtefactError(f"{folder}: cannot load {name!r}: {err}") from err
    return None


def move_to_graphs(pipeline: Any, denoisers: Iterable[Any]) -> None:
    """Move what runs in torch to the device of the denoisers' graphs, so that latents stay there.

    Args:
        pipeline: pipeline whose components in torch are on the CPU.
        denoisers: its denoisers, which run on engines.
    """
    for device in {denoiser.device for denoiser in denoisers}:
        if device.type != "cpu":
            pipeline.to(device)
