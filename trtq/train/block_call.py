"""Recorded calls of one block: inputs, step and target, kept in files while the block is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree

from trtq.errors import QuantizationError

__all__ = ["BlockCall", "StoredCall", "rows_of", "store_call"]


@dataclass(frozen=True)
class BlockCall:
    """One call of a block. Letters: B items of the denoiser's call, R rows of the block's result.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        step: index of the denoising step, `[1]`, or one per row of the denoiser.
        timestep: timesteps of the denoiser's call, `[B]`.
        teacher: values of the block's float result, float32[R, N], on the float model's trajectory.
        weight: weight of the error of each row, `[R]`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    step: Tensor
    timestep: Tensor
    teacher: Tensor
    weight: Tensor

    def values(self, block: Callable[..., Any]) -> Tensor:
        """All floating-point values of a block's result for these arguments, float32[R, N]."""
        return rows_of(block(*self.args, **self.kwargs))


def rows_of(result: Any) -> Tensor:
    """All floating-point values of a block's result, float32[R, N].

    Args:
        result: a tensor, or tensors in tuples, lists and mappings. R is the length of their first axes;
            1 if the lengths differ.

    Raises:
        QuantizationError: the result contains no tensor of floating-point numbers.
    """
    tensors = [
        leaf
        for leaf in _pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not tensors:
        raise QuantizationError(
            f"a block returns a {type(result).__name__} without floating-point tensors, so it cannot be "
            "fine-tuned alone; leave --blockwise out"
        )
    lengths = {len(tensor) if tensor.ndim else 1 for tensor in tensors}
    rows = lengths.pop() if len(lengths) == 1 else 1
    return torch.cat([tensor.float().reshape(rows, -1) for tensor in tensors], 1)


@dataclass(frozen=True)
class StoredCall:
    """A call whose tensors are in a file.

    Attributes:
        path: the safetensors file.
        spec: structure of the arguments.
        constants: the arguments that are not tensors, by their place in the structure.
    """

    path: Path
    spec: Any
    constants: Mapping[int, Any]

    def load(self, device: torch.device) -> BlockCall:
        """Read the call."""
        tensors = load_file(self.path, device=str(device))
        leaves = [
            self.constants[place] if place in self.constants else tensors[f"input.{place}"]
            for place in range(self.spec.num_leaves)
        ]
        args, kwargs = _pytree.tree_unflatten(leaves, self.spec)
        return BlockCall(
            args,
            kwargs,
            tensors["step"],
            tensors["timestep"],
            tensors["teacher"],
            tensors["weight"],
        )


def store_call(path: Path, call: BlockCall) -> StoredCall:
    """Write the tensors of a call to a new file.

    Args:
        path: path of the file.
        call: the call.
    """
    leaves, spec = _pytree.tree_flatten((call.args, dict(call.kwargs)))
    tensors = {
        "step": call.step,
        "timestep": call.timestep,
        "teacher": call.teacher,
        "weight": call.weight,
    }
    constants: dict[int, Any] = {}
    for place, leaf in enumerate(leaves):
        # Complex numbers, which a file cannot hold, are those of small tables of positions.
        if isinstance(leaf, Tensor) and not leaf.is_complex():
            tensors[f"input.{place}"] = leaf
        else:
            constants[place] = leaf
    # A file refuses views, and tensors that share their memory.
    layout = torch.contiguous_format
    save_file(
        {name: tensor.detach().clone(memory_format=layout) for name, tensor in tensors.items()},
        path,
    )
    return StoredCall(path, spec, constants)
