"""Rows of layer inputs by denoising step, and the range of each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtq.calib.attention_rows import AttentionRecorder, outlier_ratio
from trtq.calib.finite import check_finite
from trtq.calib.range_rows import input_rows
from trtq.quant.plan import LayerPlan
from trtq.quant.timestep import TimestepTable
from trtq.seeds import seeded_generator

__all__ = ["InputRows", "RowRecorder"]

_ROWS = 256


@dataclass
class InputRows:
    """Sampled rows of one layer's input: K channels, T steps, R rows per step.

    A row holds the channels of one token or one pixel.

    Attributes:
        rows: sampled rows, float32 `[T, R, K]`.
        channel_max: largest absolute value of each channel at each step, float32 `[T, K]`.
        called: whether the layer was called at each step, bool `[T]`.
    """

    rows: Tensor
    channel_max: Tensor
    called: Tensor

    @property
    def complete(self) -> bool:
        """Whether the layer was called at every step."""
        return bool(self.called.all())

    @property
    def outlier_ratio(self) -> float:
        """Largest channel over median channel, by each channel's mean over steps."""
        return outlier_ratio(self.channel_max)


class RowRecorder:
    """Records rows of layer inputs and of attention, see `trtq.calib.record.Recorder`.

    Args:
        layers: layers to observe; float layers and layers that use another layer's quantiser are
            skipped.
        table: the calibrated timesteps.
        seed: seed of the random sample.

    Attributes:
        step: index of the current denoising step.
        batch: index of the current batch of trajectories.
        inputs: rows by layer.
        attention: rows of queries, keys and values by attention with a low-bit product.
    """

    def __init__(self, layers: Sequence[LayerPlan], table: TimestepTable, seed: int) -> None:
        self.step = self.batch = 0
        self.inputs: dict[str, InputRows] = {}
        self._attention = AttentionRecorder(layers, len(table), seed)
        self.attention = self._attention.rows
        self._steps = len(table)
        self._each = max(4, _ROWS // len(table))
        self._seen: dict[tuple[str, int], int] = {}
        self._generator = seeded_generator(seed, "recorded rows")
        self._first = {
            plan.name: plan.kind == "linear"
            for plan in layers
            if plan.quantized and plan.weight_bits is not None and plan.input_of is None
        }

    @property
    def layers(self) -> list[str]:
        """The observed layers."""
        return [*self._first, *self._attention.products]

    def observe(self, layer: str, inputs: tuple[Any, ...]) -> None:
        """Record the channels' ranges and a sample of the rows of a layer's input.

        Raises:
            NonFiniteError: the input holds NaN or infinity.
        """
        if layer in self._attention.products:
            self._attention.observe(layer, inputs, self.step)
            return
        x = input_rows(inputs[0].detach().float().cpu(), linear=self._first[layer])
        largest = x.abs().amax(0)
        check_finite(largest, layer, self.step)
        entry = self.inputs.get(layer)
        if entry is None:
            entry = self.inputs[layer] = InputRows(
                torch.zeros(self._steps, self._each, x.shape[1]),
                torch.zeros(self._steps, x.shape[1]),
                torch.zeros(self._steps, dtype=torch.bool),
            )
        entry.called[self.step] = True
        torch.maximum(entry.channel_max[self.step], largest, out=entry.channel_max[self.step])
        drawn = x[torch.randint(len(x), (self._each,), generator=self._generator)]
        visits = self._seen[layer, self.step] = self._seen.get((layer, self.step), 0) + 1
        # Every call at a step has the same share of the sample (reservoir sampling).
        replaced = torch.rand(self._each, generator=self._generator) < 1 / visits
        entry.rows[self.step] = torch.where(replaced[:, None], drawn, entry.rows[self.step])
