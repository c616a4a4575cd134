"""Copies of pipelines and of the arguments of their calls."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["copied_containers", "copied_pipeline", "copied_tensors"]


def copied_pipeline(pipeline: Any) -> Any:
    """A copy of a pipeline with schedulers of its own; all other components are shared.

    Several copies can run interleaved, because a call changes only its pipeline object and schedulers.

    Args:
        pipeline: diffusers pipeline; pipelines inside it are copied as well.
    """
    copied = _copied(pipeline, {})
    if hasattr(copied, "set_progress_bar_config"):
        copied.set_progress_bar_config(disable=True)
    return copied


def _copied(pipeline: Any, copies: dict[int, Any]) -> Any:
    """The copy; `copies` holds the copied schedulers and pipelines by the identity of the original."""
    from diffusers import DiffusionPipeline

    copies[id(pipeline)] = copied = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        inner = isinstance(value, DiffusionPipeline)
        if isinstance(value, nn.Module) or not (inner or hasattr(value, "set_timesteps")):
            continue
        if id(value) not in copies:
            copies[id(value)] = _copied(value, copies) if inner else copy.deepcopy(value)
        # The registered classes of the components stay the same.
        copied.__dict__[name] = copies[id(value)]
    return copied


def copied_containers(values: Any) -> Any:
    """Nested values in other lists and dicts, with the same tensors.

    Some denoisers empty a list among their arguments, e.g. the UNet that of a T2I-Adapter's features.
    """
    return _pytree.tree_map(lambda leaf: leaf, values)


def copied_tensors(values: Any) -> Any:
    """Nested values with copies of their tensors, which a backward pass may save."""

    def each(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    # A copy that is made in inference mode could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return _pytree.tree_map(each, values)
