"""Weights that stay in their file and are read, in float32, each time they are used.

A denoiser of 12 billion parameters needs 48 GB in float32, and one layer of it a few hundred MB. A
stored weight is a parametrisation of torch: `layer.weight` reads the tensor, converts it, applies the
changes that were made to the layer since (e.g. a rotation) and returns a new tensor, which is freed
after its use. Everything that reads `layer.weight` works as with an ordinary layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trtq.errors import ArtefactError, NonFiniteError

__all__ = [
    "change_weight",
    "has_stored_weight",
    "plain_name",
    "release_weight",
    "share_weight",
    "state_tensors",
    "store_weight",
    "weight_parameter",
    "weight_shape",
]

_NAME = "weight"
_ORIGINAL = f"parametrizations.{_NAME}.original"


class _StoredWeight(nn.Module):
    """Reads a tensor of a safetensors file as float32, on the device of its placeholder."""

    def __init__(self, file: Path, key: str) -> None:
        super().__init__()
        self._file = file
        self._key = key
        self._checked = False

    def forward(self, placeholder: Tensor) -> Tensor:
        from safetensors import safe_open

        try:
            # Opened anew, so that the pages of the file do not stay in this process.
            with safe_open(self._file, framework="pt") as file:
                read: Tensor = file.get_tensor(self._key)
                tensor = read.to(placeholder.device, torch.float32, copy=True)
        # safetensors raises an exception class of its own.
        except Exception as err:
            raise ArtefactError(
                f"cannot read {self._key!r} of {self._file} again, which quantisation reads layer by "
                f"layer ({err}); leave the file in place until the run is complete"
            ) from err
        if tensor.shape != placeholder.shape:
            raise ArtefactError(
                f"{self._file} changed while it was in use: {self._key!r} has the shape "
                f"{tuple(tensor.shape)}, and had {tuple(placeholder.shape)}"
            )
        if not self._checked:
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{self._file}: {self._key!r} holds NaN or infinity")
            self._checked = True
        return tensor


class _Changed(nn.Module):
    """Changes a weight after it is read."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change = change

    def forward(self, weight: Tensor) -> Tensor:
        return self._change(weight)


def store_weight(layer: nn.Module, file: Path, key: str, shape: Sequence[int]) -> None:
    """Let a layer read its weight from a file.

    Args:
        layer: layer without a weight, e.g. on torch's meta device; changed in place.
        file: safetensors file, which stays where it is.
        key: name of the tensor in the file.
        shape: shape of the tensor.
    """
    # One number, which has the shape of the weight: sizes and devices are read from the parameter.
    placeholder = torch.zeros((1,) * len(shape)).expand(*shape)
    setattr(layer, _NAME, nn.Parameter(placeholder, requires_grad=False))
    _register(layer, _StoredWeight(file, key))


def _register(layer: nn.Module, part: nn.Module) -> None:
    # Reading the weight for torch's own checks would take long.
    parametrize.register_parametrization(layer, _NAME, part, unsafe=True)


def has_stored_weight(layer: nn.Module) -> bool:
    """Whether a layer reads its weight from a file."""
    return parametrize.is_parametrized(layer, _NAME)


def weight_parameter(layer: nn.Module) -> nn.Parameter:
    """The parameter of a layer's weight; of a stored weight its placeholder, with shape and device."""
    source = cast(Any, layer)
    parameter: nn.Parameter
    parameter = (
        source.parametrizations[_NAME].original if has_stored_weight(layer) else source.weight
    )
    return parameter


def weight_shape(layer: nn.Module) -> torch.Size:
    """Shape of a layer's weight, which is not read."""
    return weight_parameter(layer).shape


def change_weight(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a layer's weight by a function of it, in place; a stored weight is changed when read.

    Args:
        layer: the layer.
        change: function of the weight that keeps its shape.
    """
    if has_stored_weight(layer):
        _register(layer, _Changed(change))
        return
    weight = cast(Any, layer).weight
    setattr(layer, _NAME, nn.Parameter(change(weight), requires_grad=weight.requires_grad))


def share_weight(source: nn.Module, layer: nn.Module) -> None:
    """Let a layer read its weight as another layer does.

    Args:
        source: layer with a stored weight.
        layer: layer that holds the weight as an attribute, which is dropped.
    """
    parts = cast(Any, source).parametrizations[_NAME]
    if _NAME in layer.__dict__:
        del layer.__dict__[_NAME]
    setattr(layer, _NAME, parts.original)
    for part in parts:
        _register(layer, part)


def release_weight(layer: nn.Module) -> None:
    """Replace a layer's weight by an empty one; the layer can then no longer be called."""
    if has_stored_weight(layer):
        parts = cast(Any, layer).parametrizations
        del parts[_NAME]
        # torch gave the layer a class whose property reads the parametrisation.
        layer.__class__ = type(layer).__mro__[1]
        del layer._modules["parametrizations"]
    setattr(layer, _NAME, nn.Parameter(torch.empty(0), requires_grad=False))


def plain_name(name: str) -> str:
    """The name of an entry of a state dict as if no weight were stored."""
    return name.removesuffix(_ORIGINAL) + _NAME if name.endswith(_ORIGINAL) else name


def state_tensors(model: nn.Module, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The entries of a model's state dict, with the weights themselves in place of their placeholders.

    Args:
        model: any model; one stored weight at a time is in memory.
        without: plain names of entries to leave out.
    """
    for name, tensor in model.state_dict().items():
        if plain_name(name) in without:
            continue
        if name.endswith(_ORIGINAL):
            owner: Any = model.get_submodule(name.removesuffix(_ORIGINAL).removesuffix("."))
            yield plain_name(name), owner.weight
        else:
            yield name, tensor
