"""Gradient checkpointing: the backward pass recomputes a block's activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.timestep import current_step, step_scope

__all__ = ["recompute_blocks"]


def recompute_blocks(model: QuantizedDenoiser) -> bool:
    """Keep only the inputs of the denoiser's blocks for the backward pass (arXiv 1604.06174).

    Args:
        model: quantised denoiser, changed in place; predictions and gradients stay the same.

    Returns:
        Whether diffusers supports gradient checkpointing for the denoiser's class.
    """
    if not getattr(model.denoiser, "_supports_gradient_checkpointing", False):
        return False
    denoiser: Any = model.denoiser
    denoiser.enable_gradient_checkpointing(_checkpointed)
    return True


def _checkpointed(block: Any, *inputs: Any) -> Any:
    # The backward pass runs outside the step's scope, possibly in another thread.
    step = current_step()

    def again(*values: Any) -> Any:
        if step is None:
            return block(*values)
        with step_scope(step):
            return block(*values)

    if not torch.is_grad_enabled():
        return again(*inputs)
    return checkpoint(again, *inputs, use_reentrant=False)
