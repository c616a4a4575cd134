"""Activation quantisers with one scale per denoising step (EfficientDM's TALSQ)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trtq.bits import check_bits
from trtq.errors import QuantizationError, StepError
from trtq.precision import ScalePolicy
from trtq.quant.dynamic_scale import RowAxis, row_scale
from trtq.quant.fake_quant import fake_quant, round_ste
from trtq.quant.timestep import Step, TimestepTable, current_step

__all__ = ["ActivationQuantizer", "ZeroPointMode", "check_indices", "per_item", "select_step"]

ZeroPointMode = Literal["frozen", "rounded", "float"]
"""Behaviour of zero points. `frozen`: integers, not trained. `rounded`: trained, and rounded in every
forward pass. `float`: trained without rounding, as in the release; deployment rounds them."""


def check_indices(step: Tensor, rows: int) -> None:
    """Raise unless there is one step index for all rows, or one per row.

    Args:
        step: step indices.
        rows: length of the input's first axis. Rows need not be the images of the batch: layers inside a
            denoiser also see frames or tokens as rows, for which one index suits all.

    Raises:
        StepError: the number of indices is neither 1 nor the number of rows.
    """
    if step.numel() != 1 and (step.ndim != 1 or len(step) != rows):
        raise StepError(
            f"got step indices of shape {tuple(step.shape)} for {rows} rows; give one index, or one per "
            f"row (shape [{rows}]). A layer whose rows are frames or tokens takes one index: wrap the "
            "denoiser with per_item=False"
        )


def select_step(table: Tensor, step: Step, batch: int) -> Tensor:
    """The entries of `table[T]` for a step: shape `[]`, or `[B]` with one entry per row.

    Args:
        table: one entry per calibrated timestep, `[T]`.
        step: index of the denoising step: one for all rows, or one per row.
        batch: number B of rows, the length of the input's first axis.

    Raises:
        StepError: an index lies outside the table, or the number of indices is neither 1 nor B.
    """
    if isinstance(step, int):
        if not 0 <= step < len(table):
            raise StepError(f"step {step} is outside the table; it has steps 0 .. {len(table) - 1}")
        return table[step]
    check_indices(step, batch)
    # Checking values on a GPU would synchronise, which is impossible in a CUDA graph; there the caller
    # that creates the index checks the values.
    checkable = step.device.type == "cpu" and not torch.compiler.is_compiling()
    if checkable and (int(step.min()) < 0 or int(step.max()) >= len(table)):
        raise StepError(
            f"step indices {step.tolist()} leave the table; it has steps 0 .. {len(table) - 1}"
        )
    entries = table.index_select(0, step.reshape(-1))
    return entries if len(entries) > 1 else entries.reshape(())


def per_item(values: Tensor, x: Tensor) -> Tensor:
    """Reshape `[B]` values to broadcast over `x[B, ...]`; a scalar is returned unchanged."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


class ActivationQuantizer(nn.Module):
    """Fake-quantise `x` with the scale and zero point of its denoising step.

    Code `k = clip(round(x / s[t]), -z[t], 2**bits - 1 - z[t])`, value `k * s[t]`. Float zero is code 0,
    so the zero padding of a convolution is exact.

    Args:
        bits: width of the codes, 2 .. 8 bits.
        table: the T calibrated timesteps, each with its own scale. A table of one timestep makes the
            quantiser static.
        zero_point_mode: behaviour of the zero points, see `ZeroPointMode`.
        symmetric: whether the zero points stay at `2**(bits - 1)`; None: only at 8 bits, because 8-bit
            codes fit int8 in no other form.
        policy: origin of the scale, see `trtq.quant.dynamic_scale`; other policies than `step` are
            symmetric.
        row_axis: what a row is, for other policies than `step`.

    Attributes:
        scale: parameter `[T]`, the scales `s`.
        zero_point: parameter `[T]`, the zero points `z` as codes.
    """

    def __init__(
        self,
        bits: int,
        table: TimestepTable,
        zero_point_mode: ZeroPointMode = "frozen",
        symmetric: bool | None = None,
        policy: ScalePolicy = "step",
        row_axis: RowAxis = "last",
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.qmax = 2**bits - 1
        self.policy: ScalePolicy = policy
        self.row_axis: RowAxis = row_axis
        self.symmetric = (bits == 8 if symmetric is None else symmetric) or policy != "step"
        self.zero_point_mode: ZeroPointMode = "frozen" if self.symmetric else zero_point_mode
        middle = float(2 ** (bits - 1))
        self.scale = nn.Parameter(torch.ones(len(table)), requires_grad=policy != "row")
        self.zero_point = nn.Parameter(
            torch.full((len(table),), middle), requires_grad=self.zero_point_mode != "frozen"
        )

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x[B, ...] -> the nearest representable values, with the same shape and dtype.

        Args:
            x: activation, batch first.
            step: index of the denoising step, one for all rows or one per row; None: the step of the
                enclosing `step_scope`.

        Raises:
            StepError: there is no current step, or the step is outside the table.
        """
        if step is None:
            step = current_step()
            if step is None:
                return x
        zero_point: Tensor = self.zero_point
        if self.zero_point_mode == "rounded":
            zero_point = round_ste(zero_point)
        return fake_quant(
            x,
            self._scale(x, step),
            per_item(select_step(zero_point, step, len(x)), x),
            0,
            self.qmax,
            reciprocal=True,
        )

    def _scale(self, x: Tensor, step: Step) -> Tensor:
        """The scale of each row, or of each item."""
        of_step = per_item(select_step(self.scale, step, len(x)), x)
        if self.policy == "step":
            return of_step
        of_row = row_scale(x, self.bits, self.row_axis)
        return of_row if self.policy == "row" else torch.minimum(of_row, of_step)

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the calibrated `scale[T]` and `zero_point[T]`."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @torch.no_grad()
    def clamp_(self, lowest: Tensor, highest: Tensor) -> None:
        """Clamp trained values: zero points to the codes `0 .. 2**bits - 1`, scales to given bounds.

        Args:
            lowest: minimum scales, `[T]`, positive.
            highest: maximum scales, `[T]`.
        """
        self.scale.clamp_(lowest, highest)
        self.zero_point.clamp_(0, self.qmax)

    def integer_bounds(self) -> tuple[Tensor, Tensor]:
        """The integer clip limits `lo[T] <= 0 <= hi[T]`, int32.

        Returns:
            Lower and upper limits, int32[T] each.

        Raises:
            QuantizationError: a zero point lies outside the codes and does not fit an integer kernel.
        """
        zero_point = self.zero_point.detach().round()
        if bool(((zero_point < 0) | (zero_point > self.qmax)).any()):
            raise QuantizationError(
                f"zero points must lie in 0 .. {self.qmax} to be deployed, got "
                f"{zero_point.min().item():g} .. {zero_point.max().item():g}; "
                "calibrate with ranges that contain zero"
            )
        return (-zero_point).int(), (self.qmax - zero_point).int()

    def extra_repr(self) -> str:
        """Bits, number of steps and zero-point mode."""
        return f"bits={self.bits}, steps={len(self.scale)}, zero_point={self.zero_point_mode}"
