"""What diffusers' pipelines ask of their denoiser beside calling it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

__all__ = ["StandIn"]


class StandIn(nn.Module):
    """A module that stands where a pipeline expects its own UNet or transformer; has a `config`."""

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Transformers are told which half of the guidance follows; nothing is kept between calls."""
        yield

    @property
    def add_embedding(self) -> Any:
        """Stable Diffusion XL's pipeline asks how wide the first layer of this module is."""
        config: Any = self.config
        width = config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
