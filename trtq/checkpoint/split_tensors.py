"""Conversion of a file in the original layout by the sizes of the model, not of the released one.

Several conversions of diffusers have the sizes of one released model written out, e.g. that of Flux, and
fail for other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trtq.checkpoint.conversion_probe import ConversionError
from trtq.checkpoint.original_names import OriginalTensor, original_tensors

__all__ = ["split_originals"]

_PREFIX = "model.diffusion_model."


def split_originals(
    model: nn.Module, config: Mapping[str, Any], checkpoint: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a model from those of a file in the layout of the model's authors.

    Args:
        model: model of diffusers, its parameters may have no memory.
        config: its configuration.
        checkpoint: tensors of the file by name.

    Returns:
        The tensors by name in diffusers. A tensor with a missing part is left out; a tensor of the wrong
        shape has the shape that the file gives it.

    Raises:
        ConversionError: the names of the original layout cannot be found.
    """
    expected = model.state_dict()
    originals = original_tensors(type(model).__name__, config, list(expected))
    parts: dict[str, dict[int, Tensor]] = {}
    counts = {s.name: s.count for tensor in originals.values() for s in tensor.sources}
    is_empty = True
    for name, original in originals.items():
        tensor = checkpoint.get(name, checkpoint.get(_PREFIX + name))
        if tensor is not None:
            is_empty = False
            for source, rows in zip(
                original.sources, _split(tensor, original, expected), strict=True
            ):
                parts.setdefault(source.name, {})[source.index] = rows
    if is_empty:
        raise ConversionError("the file has no tensor of the layout")
    return {
        name: torch.cat([pieces[index] for index in range(counts[name])])
        if counts[name] > 1
        else pieces[0]
        for name, pieces in parts.items()
        if len(pieces) == counts[name]
    }


def _split(
    tensor: Tensor, original: OriginalTensor, expected: Mapping[str, Tensor]
) -> list[Tensor]:
    """The rows of a tensor for each of its sources; the last one gets what the sizes leave."""
    if original.flattened:
        shape = expected[original.sources[0].name].shape
        return [tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor]
    if len(original.sources) == 1:
        return [tensor]
    sizes = [len(expected[source.name]) // source.count for source in original.sources]
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    ends = [*starts[1:-1], max(len(tensor), starts[-1])]
    return [tensor[start:end] for start, end in zip(starts[:-1], ends, strict=True)]
