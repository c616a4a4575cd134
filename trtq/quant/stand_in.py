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
_WITH_MODEL = ("set_attn_processor",)
"""Methods among them that a low-bit denoiser supports if it has a model with this method inside."""


class _NotOfLowBitError(UsageError, AttributeError):
    """A method that a low-bit denoiser does not support; `hasattr` returns False for it."""


@contextmanager
def _cache_context(name: str) -> Iterator[None]:
    """Accept the pipeline's name of a guidance half; an engine keeps no state."""
    yield


def _blank(stand_in_class: type[StandIn]) -> StandIn:
    """A stand-in without its attributes, for copies."""
    return stand_in_class.__new__(stand_in_class)


class StandIn(nn.Module):
    """Base class of modules that replace a pipeline's UNet or transformer; subclasses have `config`.

    A stand-in for a model, the module or attribute `model` unless a subclass says otherwise, has every
    attribute of the model that it does not define, and is an instance of the model's class for
    `isinstance`; `type` returns the class of the stand-in.
    """

    def model_inside(self) -> nn.Module | None:
        """The model that this module replaces; None: no such model is in memory."""
        # The dictionaries may be missing while the module is created or copied.
        modules: dict[str, Any] = self.__dict__.get("_modules", {})
        model: nn.Module | None = modules.get("model", self.__dict__.get("model"))
        return model

    @property  # type: ignore[misc]  # Nothing assigns the class of a stand-in.
    def __class__(self) -> Any:
        """Class of the replaced model, which pipelines check; without a model, of the stand-in."""
        model = self.model_inside()
        return type(self) if model is None else model.__class__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The default form names `__class__`, which is not the class of this object.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _blank, (type(self),), state

    def _get_name(self) -> str:
        return type(self).__name__

    def __getattr__(self, name: str) -> Any:
        """Attribute of the module, or of the model that it replaces.

        Raises:
            UsageError: the attribute is a method of diffusers' models that a low-bit denoiser does not
                support; the message names the alternative. The error is an `AttributeError` too.
        """
        advice = _INSTEAD.get(name)
        supported = name in _WITH_MODEL and hasattr(self.model_inside(), name)
        if advice is not None and not supported:
            raise _NotOfLowBitError(f"a low-bit denoiser has no {name}: {advice}")
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Special methods belong to an object's own class: `copy` asks for `__deepcopy__`.
            if name.startswith("__"):
                raise
            model = self.model_inside()
            if model is not None:
                return getattr(model, name)
            if name == "cache_context":
                return _cache_context
            if name == "add_embedding":
                return self._embedding_sizes()
            raise

    def _embedding_sizes(self) -> Any:
        """Stand-in for a module whose input width Stable Diffusion XL's pipeline reads."""
        config: Any = self.config
        width = config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
