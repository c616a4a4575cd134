"""What diffusers' pipelines ask of their denoiser beside calling it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from trtq.errors import UsageError

__all__ = ["StandIn"]

_LORA = "merge LoRAs into the float model: trtq quantize MODEL --lora FILE"
_FLOAT = "change the float pipeline before it is quantised"
_INSTEAD = {
    "add_adapter": _LORA,
    "enable_freeu": "it is not part of what was calibrated",
    "enable_gradient_checkpointing": "trtq quantize trains it",
    "enable_layerwise_casting": "its weights are low-bit already",
    "fuse_qkv_projections": _FLOAT,
    "load_attn_procs": _LORA,
    "load_lora_adapter": _LORA,
    "save_pretrained": "copy the folder it was loaded from",
    "set_attn_processor": _FLOAT,
    "set_attention_backend": _FLOAT,
}
"""What users call on diffusers' models and a low-bit one cannot do, and what to do."""


class _NotOfLowBitError(UsageError, AttributeError):
    """Asked for by name; `hasattr` says that it is not there."""


class StandIn(nn.Module):
    """A module that stands where a pipeline expects its own UNet or transformer; has a `config`."""

    def __getattr__(self, name: str) -> Any:
        """As of any module; of what only diffusers' models have, the error says what to do.

        Raises:
            UsageError: it is one of those; an `AttributeError` too.
        """
        advice = _INSTEAD.get(name)
        if advice is not None:
            raise _NotOfLowBitError(f"a low-bit denoiser has no {name}: {advice}")
        return super().__getattr__(name)

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
