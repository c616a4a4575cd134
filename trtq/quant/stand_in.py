"""Attributes of the denoiser that diffusers' pipelines read, in addition to calling it."""

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
"""Methods of diffusers' models that a low-bit denoiser does not support, with the alternative."""


class _NotOfLowBitError(UsageError, AttributeError):
    """A method that a low-bit denoiser does not support; `hasattr` returns False for it."""


class StandIn(nn.Module):
    """Base class of modules that replace a pipeline's UNet or transformer; subclasses have `config`."""

    def __getattr__(self, name: str) -> Any:
        """Attribute of the module.

        Raises:
            UsageError: the attribute is a method of diffusers' models that a low-bit denoiser does not
                support; the message names the alternative. The error is an `AttributeError` too.
        """
        advice = _INSTEAD.get(name)
        if advice is not None:
            raise _NotOfLowBitError(f"a low-bit denoiser has no {name}: {advice}")
        return super().__getattr__(name)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Accept the pipeline's name of a guidance half; the denoiser keeps no state."""
        yield

    @property
    def add_embedding(self) -> Any:
        """Stand-in for a module whose input width Stable Diffusion XL's pipeline reads."""
        config: Any = self.config
        width = config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
