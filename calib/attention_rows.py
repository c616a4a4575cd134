"""Rows of queries, keys and values by denoising step, and the range of each channel.

Letters: T steps; S recorded steps; B images; H heads; M, M' tokens of a call; R, R' sampled tokens;
D channels of a head; C channels of all heads, C = H D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtq.calib.finite import check_finite
from trtq.quant.plan import LayerPlan
from trtq.seeds import seeded_generator

__all__ = ["AttentionRecorder", "AttentionRows", "outlier_ratio"]

_STEPS = 16
_TOKENS = 32
_SCORES, _MIX = ".processor.scores", ".processor.mix"


def outlier_ratio(channel_max: Tensor) -> float:
    """Largest channel over median channel, by each channel's mean over steps.

    Args:
        channel_max: largest absolute value of each channel at each step, `[T, C]`.
    """
    channels = channel_max.mean(0)
    median = float(channels.median())
    return float(channels.max()) / median if median > 0 else 0.0


@dataclass
class AttentionRows:
    """Sampled tokens of one attention, of one image per step, and the range of each channel.

    Attributes:
        channel_max: largest absolute value of each channel of queries, keys and values at each step,
            float32 `[3, T, C]`.
        called: whether both products were called at each step, bool `[T]`.
        samples: queries `[H, R, D]`, keys `[H, R', D]` and values `[H, R', D]` of the same tokens as the
            keys, by step.
    """

    channel_max: Tensor
    called: Tensor
    samples: dict[int, tuple[Tensor, Tensor, Tensor]]

    @property
    def complete(self) -> bool:
        """Whether the attention was called at every step."""
        return bool(self.called.all()) and bool(self.samples)

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[S, H, R, D]`, keys and values `[S, H, R', D]`."""
        steps = [self.samples[step] for step in sorted(self.samples)]
        counts = [min(each[part].shape[1] for each in steps) for part in range(3)]
        query, key, value = (
            torch.stack([each[part][:, :count] for each in steps])
            for part, count in enumerate(counts)
        )
        return query, key, value


class AttentionRecorder:
    """Records tokens of decomposed attention from the inputs of its products.

    Args:
        layers: layers of a denoiser; an attention is recorded if one of its products is low-bit.
        steps: number T of calibrated timesteps.
        seed: seed of the random sample.

    Attributes:
        products: paths of the observed products.
        rows: rows by path of the attention module.
    """

    def __init__(self, layers: Sequence[LayerPlan], steps: int, seed: int) -> None:
        known = {plan.name: plan for plan in layers if plan.kind == "product"}
        self.products: set[str] = set()
        for name in known:
            pair = name.removesuffix(_SCORES) + _SCORES, name.removesuffix(_SCORES) + _MIX
            if name.endswith(_SCORES) and pair[1] in known:
                self.products |= set(pair) if any(known[each].quantized for each in pair) else set()
        self.rows: dict[str, AttentionRows] = {}
        self._steps = steps
        count = min(steps, _STEPS)
        self._kept = set(torch.linspace(0, steps - 1, count).round().long().tolist())
        self._seen: dict[tuple[str, int], int] = {}
        self._generator = seeded_generator(seed, "recorded attention")
        # Queries, keys, image and tokens of the attention that is being computed.
        self._open: dict[str, tuple[Tensor, Tensor, int, Tensor]] = {}

    def observe(self, product: str, inputs: tuple[Any, ...], step: int) -> None:
        """Record the operands of one call of a product.

        Args:
            product: path of the product.
            inputs: `q[B, H, M, D]` and `k^T[B, H, D, M']`, or probabilities `[B, H, M, M']` and
                `v[B, H, M', D]`.
            step: index of the denoising step.

        Raises:
            NonFiniteError: an operand holds NaN or infinity.
        """
        attention = product.removesuffix(_SCORES).removesuffix(_MIX)
        left, right = (each.detach() for each in inputs)
        if product.endswith(_SCORES):
            key = right.transpose(-1, -2)
            self._keep_max(product, attention, 0, left, step)
            self._keep_max(product, attention, 1, key, step)
            self._draw(attention, left, key, step)
            return
        self._keep_max(product, attention, 2, right, step)
        self.rows[attention].called[step] = True
        sample = self._open.pop(attention, None)
        if sample is not None:
            query, keys, image, tokens = sample
            value = right[image][:, tokens.to(right.device)].float().cpu()
            self.rows[attention].samples[step] = query, keys, value

    def _keep_max(self, product: str, attention: str, part: int, x: Tensor, step: int) -> None:
        """Update the largest values of the channels of `x[B, H, M, D]`."""
        largest = x.float().abs().amax((0, 2)).flatten().cpu()
        check_finite(largest, product, step)
        entry = self.rows.get(attention)
        if entry is None:
            entry = self.rows[attention] = AttentionRows(
                torch.zeros(3, self._steps, len(largest)),
                torch.zeros(self._steps, dtype=torch.bool),
                {},
            )
        kept = entry.channel_max[part, step]
        torch.maximum(kept, largest, out=kept)

    def _draw(self, attention: str, query: Tensor, key: Tensor, step: int) -> None:
        """Draw tokens of one image of a call."""
        if step not in self._kept:
            return
        visits = self._seen[attention, step] = self._seen.get((attention, step), 0) + 1
        # Every call at a step is kept with the same probability (reservoir sampling).
        if float(torch.rand(1, generator=self._generator)) >= 1 / visits:
            return
        image = int(torch.randint(len(query), (1,), generator=self._generator))
        parts = []
        for x in (query, key):
            tokens = torch.randperm(x.shape[2], generator=self._generator)[:_TOKENS]
            parts.append((x[image][:, tokens.to(x.device)].float().cpu(), tokens))
        (queries, _), (keys, tokens) = parts
        self._open[attention] = queries, keys, image, tokens
