"""Look-up from a timestep to the index of its scales.

The `T` calibrated timesteps are sorted. A timestep uses the scales of the nearest calibrated timestep,
and the noisier one in a tie. The index is a function of the timestep alone, so any scheduler, any
number of steps and batches that mix steps work, both in torch and in the exported graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor

from trtq.errors import StepError, UsageError

__all__ = ["Step", "TimestepTable", "current_step", "float_scope", "step_scope"]

Step = int | Tensor
"""Index of a denoising step: one for the whole batch, or LongTensor[B] with one per batch item."""


class TimestepTable:
    """The calibrated timesteps, with a look-up from any timestep to the index of the nearest entry.

    Index 0 is the last, cleanest step; `T - 1` is the first, noisiest step.

    Args:
        timesteps: `T >= 1` distinct finite numbers, in any order.
    """

    def __init__(self, timesteps: Iterable[float]) -> None:
        values = sorted(float(t) for t in timesteps)
        if not values:
            raise UsageError("a timestep table needs at least one timestep, got none")
        tensor = torch.tensor(values, dtype=torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"timesteps must be finite numbers, got {values}")
        if bool((tensor.diff() <= 0).any()):
            raise UsageError(f"timesteps must differ from each other, got {values}")
        self.timesteps: Final = tensor
        self.edges: Final = (tensor[1:] + tensor[:-1]) / 2

    def __len__(self) -> int:
        """The number T of calibrated timesteps."""
        return len(self.timesteps)

    def __eq__(self, other: object) -> bool:
        """Whether the timesteps of both tables are equal."""
        return isinstance(other, TimestepTable) and torch.equal(self.timesteps, other.timesteps)

    def __hash__(self) -> int:
        """Hash of the timesteps."""
        return hash(tuple(self.timesteps.tolist()))

    def __repr__(self) -> str:
        """The timesteps, cleanest first."""
        return f"TimestepTable({[int(t) if t == int(t) else t for t in self.timesteps.tolist()]})"

    def index(self, timestep: Tensor | float) -> Tensor:
        """The index of the nearest calibrated timestep.

        Args:
            timestep: a number, or a tensor of shape `[]` or `[B]` and any dtype.

        Returns:
            LongTensor[B] (B = 1 for a number) with values in `[0, T)`.

        Raises:
            StepError: a timestep is NaN, or the tensor has more than one axis.
        """
        t = torch.as_tensor(timestep).to(torch.float32).reshape(-1).contiguous()
        if torch.as_tensor(timestep).ndim > 1:
            raise StepError(
                f"timestep has shape {tuple(torch.as_tensor(timestep).shape)}; "
                "give a number or one timestep per batch item, shape [B]"
            )
        if bool(t.isnan().any()):
            raise StepError("timestep is NaN; give finite timesteps")
        # right=True counts the edges <= t, so a tie resolves to the noisier step.
        return torch.bucketize(t, self.edges.to(t.device), right=True)


class _Float:
    """Marker of the scope in which quantised layers compute in float."""


_FLOAT: Final = _Float()
_scope: ContextVar[Step | _Float | None] = ContextVar("trtq_step", default=None)


@contextmanager
def step_scope(step: Step) -> Iterator[None]:
    """Inside the block, quantised layers use this denoising step.

    The denoiser's forward opens the scope with the index of its `timestep` argument, so the arguments of
    the call alone determine which scales a layer uses. A scope is needed because diffusers' blocks call
    their layers with `x` only. The scope is local to the thread.
    """
    token = _scope.set(step)
    try:
        yield
    finally:
        _scope.reset(token)


@contextmanager
def float_scope() -> Iterator[None]:
    """Inside the block, quantised layers compute in float, as the teacher's layers."""
    token = _scope.set(_FLOAT)
    try:
        yield
    finally:
        _scope.reset(token)


def current_step() -> Step | None:
    """The step of the enclosing `step_scope`; None inside `float_scope`.

    Raises:
        StepError: there is no enclosing scope.
    """
    step = _scope.get()
    if step is None:
        raise StepError(
            "a quantised layer was called without a denoising step; call the denoiser with its "
            "timestep, or pass step= to the layer"
        )
    return None if isinstance(step, _Float) else step
