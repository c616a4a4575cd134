"""Points of a fine-tuning inside a pipeline's call: the calls, and the values that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtq.calls.form import flatten_value
from trtq.calls.joined import Joined
from trtq.errors import QuantizationError

__all__ = ["CalledBatch", "joined_output"]


@dataclass(frozen=True)
class CalledBatch:
    """Calls of a denoiser that are computed together, with the teacher's predictions.

    A call is one item, whether its rows are images, halves of a guided batch, frames or tokens. Letter:
    B calls.

    Attributes:
        calls: the calls.
        timestep: timesteps of the calls, the largest if a call has several, `[B]`.
        teacher: all values of the teacher's results, float32[B, N].
        weight: weight of an error at each call's timestep, `[B]`.
    """

    calls: Joined
    timestep: Tensor
    teacher: Tensor
    weight: Tensor


def joined_output(result: Any) -> Tensor:
    """All values of a denoiser's result in one tensor, float32[1, N].

    Args:
        result: a tensor, or tensors in tuples, lists and mappings; integers are left out.

    Raises:
        QuantizationError: the result contains no tensor of floating-point numbers.
    """
    tensors: dict[str, Tensor] = {}
    flatten_value(result, "output", tensors, {})
    parts = [tensor.flatten().float() for tensor in tensors.values() if tensor.is_floating_point()]
    if not parts:
        raise QuantizationError(
            f"the denoiser returns a {type(result).__name__} without floating-point tensors, so it "
            "cannot be fine-tuned; choose a method without fine-tuning"
        )
    return torch.cat(parts).unsqueeze(0)
