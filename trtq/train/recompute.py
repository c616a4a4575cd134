"""Gradient checkpointing: activations of a block are computed again in the backward pass, not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.timestep import current_step, step_scope

__all__ = ["recompute_blocks"]


def recompute_blocks(model: QuantizedDenoiser) -> bool:
    """Let the denoiser's blocks keep their inputs only (arXiv 1604.06174).

    Args:
        model: changed in place; predictions and gradients stay what they were.

    Returns:
        Whether its class supports that in diffusers.
    """
    if not getattr(model.denoiser, "_supports_gradient_checkpointing", False):
        return False
    denoiser: Any = model.denoiser
    denoiser.enable_gradient_checkpointing(_checkpointed)
    return True


def _checkpointed(block: Any, *inputs: Any) -> Any:
    # The backward pass has left the scope of the step, and may run in a thread of its own.
    step = current_step()

    def again(*values: Any) -> Any:
        if step is None:
            return block(*values)
        with step_scope(step):
            return block(*values)

    if not torch.is_grad_enabled():
        return again(*inputs)
    return checkpoint(again, *inputs, use_reentrant=False)
