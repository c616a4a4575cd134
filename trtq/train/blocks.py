"""The blocks of a denoiser: the elements of its repeated structure, which can be trained one by one.

The blocks are read from the tree of modules, not from a list of families. A list of modules whose
elements hold several layers, such as `transformer_blocks` or the `resnets` of a UNet's `down_blocks`, is
a repeated structure. Its elements are blocks, and so is every other module next to it, down to a single
layer such as `conv_in`. So each layer belongs to one block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError
from trtq.quant.activation import ActivationQuantizer
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.part import QuantizedPart
from trtq.quant.timestep import float_scope, step_scope
from trtq.train.block_call import BlockCall

__all__ = ["Block", "block_paths", "blocks_of", "is_inside"]

_UNCALLED = (nn.ModuleList, nn.ModuleDict)
"""Modules that only hold others; a denoiser calls their elements."""
_LISTS = (*_UNCALLED, nn.Sequential)
_SEVERAL = 2
"""Number of layers from which a module is more than a layer with its activation or dropout."""


def block_paths(denoiser: nn.Module, layers: Collection[str]) -> list[str]:
    """Paths of the blocks, in the order of the tree; every layer lies in exactly one of them.

    Args:
        denoiser: the denoiser, quantised or not.
        layers: paths of the layers.

    Raises:
        QuantizationError: the denoiser has no repeated structure.
    """
    paths = list(_blocks_in(denoiser, "", set(layers)))
    if sum(_count(path, layers) >= _SEVERAL for path in paths) < _SEVERAL:
        raise QuantizationError(
            f"{type(denoiser).__name__} has no blocks to fine-tune one by one: neither a list of "
            "modules (ModuleList, ModuleDict, Sequential) nor the modules next to each other at its top "
            f"include two with {_SEVERAL} or more of its {len(layers)} layers; leave --blockwise out"
        )
    return paths


def is_inside(name: str, path: str) -> bool:
    """Whether a module's path is `path`, or that of a module inside it."""
    return name == path or name.startswith(f"{path}.")


def _count(path: str, layers: Collection[str]) -> int:
    """Number of layers inside a module, or 1 for a layer."""
    return sum(not path or is_inside(name, path) for name in layers)


def _blocks_in(module: nn.Module, path: str, layers: Collection[str]) -> Iterator[str]:
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        inside = _count(place, layers)
        # A module around everything else is no part of it.
        around = inside == len(layers) > 1
        if around or isinstance(child, _UNCALLED) or _repeats(child, place, layers):
            yield from _blocks_in(child, place, layers)
        elif inside:
            yield place


def _repeats(module: nn.Module, path: str, layers: Collection[str]) -> bool:
    """Whether a module is, or contains, a list of modules with several layers each."""
    for name, inner in module.named_modules():
        place = f"{path}.{name}" if name else path
        if isinstance(inner, _LISTS) and any(
            _count(f"{place}.{element}", layers) >= _SEVERAL
            for element, _ in inner.named_children()
        ):
            return True
    return False


class Block(QuantizedPart):
    """A block of a quantised denoiser, both teacher and student.

    Args:
        model: the quantised denoiser.
        path: path of the block.
        others: quantisers that an earlier block has trained; they stay as they are.
    """

    def __init__(
        self, model: QuantizedDenoiser, path: str, others: Collection[ActivationQuantizer] = ()
    ) -> None:
        super().__init__()
        self.denoiser = model.denoiser.get_submodule(path)
        self.place = path
        self._others = {id(quantizer) for quantizer in others}

    def activations(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        """The activation quantisers of this block that no earlier block has trained."""
        for name, quantizer in super().activations():
            if id(quantizer) not in self._others:
                yield name, quantizer

    def forward(self, call: BlockCall) -> Tensor:
        """The values of the block's low-bit result at a recorded call, float32[R, N]."""
        with step_scope(call.step):
            return call.values(self.denoiser)

    @torch.no_grad()
    def teacher(self, call: BlockCall) -> Tensor:
        """The values of the block's float result at a recorded call, float32[R, N]."""
        with float_scope():
            return call.values(self.denoiser)


def blocks_of(model: QuantizedDenoiser, called: Callable[[list[str]], list[str]]) -> list[Block]:
    """The blocks of a quantised denoiser in the order of their calls.

    A quantiser that several blocks share belongs to the first of them.

    Args:
        model: the quantised denoiser.
        called: function that sorts paths by the order of the first call, without those that are never
            called.

    Raises:
        QuantizationError: the denoiser has no repeated structure.
    """
    paths = block_paths(model.denoiser, [name for name, _ in model.layers()])
    blocks: list[Block] = []
    earlier: list[ActivationQuantizer] = []
    for path in called(paths):
        block = Block(model, path, earlier)
        earlier += [quantizer for _, quantizer in block.activations()]
        blocks.append(block)
    return blocks
