"""The quantised denoiser: a diffusers model that derives its scales from its timestep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError, StepError
from trtq.quant.part import QuantizedPart
from trtq.quant.stand_in import StandIn
from trtq.quant.timestep import TimestepTable, float_scope, step_scope

__all__ = ["QuantizedDenoiser"]


class QuantizedDenoiser(StandIn, QuantizedPart):
    """A denoiser that looks up its timestep and passes the step's index to its layers.

    Its arguments, attributes and result are those of the wrapped diffusers model.

    Args:
        denoiser: diffusers model that contains quantised or deployed layers.
        table: the calibrated timesteps.
        timestep: name of the argument of `forward` that holds the timestep.
        per_item: whether each batch item has its own step: timesteps `[B]` then give B indices, for
            layers whose rows are the images. If False, a call has one index, of its largest (noisiest)
            timestep, for layers whose rows are also frames or tokens; timesteps may have any shape.

    Raises:
        QuantizationError: the denoiser's forward has no argument of this name.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        table: TimestepTable,
        timestep: str = "timestep",
        per_item: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.table = table
        self.timestep = timestep
        self.per_item = per_item
        self._signature = inspect.signature(denoiser.forward)
        if timestep not in self._signature.parameters:
            raise QuantizationError(
                f"{type(denoiser).__name__}.forward has no argument {timestep!r}, so its scales cannot "
                "follow the denoising step; name the argument that holds the timestep, one of "
                f"{', '.join(self._signature.parameters) or 'none'}"
            )

    def model_inside(self) -> nn.Module | None:
        """The wrapped model; see `StandIn.model_inside`."""
        modules: dict[str, nn.Module | None] = self.__dict__.get("_modules", {})
        return modules.get("denoiser")

    @property
    def config(self) -> Any:
        """The configuration of the wrapped model."""
        return self.denoiser.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the wrapped model's parameters."""
        return next(self._tensors()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the wrapped model's parameters."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        """Parameters and float buffers; a fully low-bit model may have no parameters."""
        buffers = list(self.denoiser.buffers())
        yield from self.denoiser.parameters()
        yield from (buffer for buffer in buffers if buffer.is_floating_point())

    def step_of(self, *args: Any, **kwargs: Any) -> Tensor:
        """The step index of a call, `[1]`, or `[B]` with one index per batch item.

        Raises:
            StepError: the timestep is missing, empty or NaN, or has several axes with `per_item`.
        """
        try:
            value = self._signature.bind(*args, **kwargs).arguments[self.timestep]
        except (TypeError, KeyError) as err:
            raise StepError(
                f"the denoiser was called without its timestep, the argument {self.timestep!r}: {err}"
            ) from err
        if self.per_item:
            return self.table.index(value)
        timesteps = torch.as_tensor(value)
        if timesteps.numel() == 0:
            raise StepError(f"{self.timestep!r} holds no timestep; give at least one")
        return self.table.index(timesteps.max())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The low-bit prediction; arguments and result are those of the wrapped model."""
        with step_scope(self.step_of(*args, **kwargs)):
            return self.denoiser(*args, **kwargs)

    @torch.no_grad()
    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        """The float prediction, computed with the same copy of the weights, without gradients."""
        with float_scope():
            return self.denoiser(*args, **kwargs)
