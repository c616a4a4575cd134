"""Changes in the last bits of a model's activations, which measure how well it agrees with itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trtq.quant.formats import QUANTIZED_INPUTS
from trtq.quant.hooks import input_hooks
from trtq.seeds import seeded_generator

__all__ = ["LAST_BIT", "Change", "last_bit_moved"]

Change = float | tuple[Tensor, ...]
LAST_BIT = 2.0**-22
"""Relative change of a value in the measurement of the floor: two to four units in the last place of
float32, whose spacing is 2**-24 to 2**-23 of the value."""


@contextmanager
def last_bit_moved(
    reference: Any,
    relative: float | Mapping[str, Change] = LAST_BIT,
    pattern: int = 0,
) -> Iterator[None]:
    """Inside the block, change every input of a low-bit layer by `relative`, about its last bit.

    Args:
        reference: the model.
        relative: relative change of the values; or one for each layer whose inputs change, by path: a
            number, or the absolute change of each input as a tensor.
        pattern: number of a pattern of signs; 0: alternating signs.
    """

    def signs_of(count: int) -> Tensor:
        if pattern:
            generator = seeded_generator(pattern, "last bits", count)
            return torch.randint(2, (count,), generator=generator).float() * 2 - 1
        signs = torch.ones(count)
        signs[::2] = -1
        return signs

    def move(name: str, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        changed = []
        change: Change = relative[name] if isinstance(relative, Mapping) else relative
        for place, x in enumerate(inputs):
            if x.is_floating_point():
                signs = signs_of(x.numel()).to(x.device)
                by = signs.reshape(x.shape)
                x = (
                    x + change[place].to(x) * by
                    if isinstance(change, tuple)
                    else x * (1 + change * by)
                )
            changed.append(x)
        return tuple(changed)

    named = reference.named_modules() if isinstance(reference, nn.Module) else ()
    moved = {
        name: module
        for name, module in named
        if (
            name in relative
            if isinstance(relative, Mapping)
            else isinstance(module, QUANTIZED_INPUTS)
        )
    }
    with input_hooks(moved, move):
        yield
