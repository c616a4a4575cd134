"""Learn the rounding direction of each weight (AdaRound, arXiv 2004.10568), layer by layer.

    minimise over alpha   mean || op(x~, W(alpha)) - op(x, W) ||^2 + 0.01 / n * rounding_loss(alpha)

where `x~` are the layer's inputs in the quantised model, whose earlier layers already have learned
rounding, and `x` its inputs in the float model; both come from the teacher's trajectories. The rounding
loss is omitted in the first fifth of the iterations; then its temperature falls from 20 to 2.

QuEST's authors (arXiv 2402.03666) reconstruct whole blocks, with 20,000 iterations each at a rate of
1e-3. Their inputs come from the model with quantised weights and float activations, ours from the fully
quantised model. Their error is a sum over the output's channels and their rounding loss a sum over the
weights; both are means here, so their rounding loss has `C_in k^2` times the weight. With a few hundred
iterations many of our directions are therefore still undecided when they are frozen. Freezing them costs
about half of a single layer's gain; in our runs a larger weight did not improve the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import NonFiniteError
from trtq.quant.adaround import hard_direction, initial_alpha, rounding_loss
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.hooks import output_hooks
from trtq.quant.modules import QuantLayer
from trtq.quant.plan import named_errors
from trtq.quant.timestep import step_scope
from trtq.seeds import seeded_generator
from trtq.train.points import Points

__all__ = ["learn_rounding"]

logger = logging.getLogger(__name__)

_Rows = tuple[Tensor, Tensor, Tensor]
"""A layer's inputs in the quantised model, its outputs in the float model, and their steps, by row."""

_WARM_UP = 0.2
_HOT, _COLD = 20.0, 2.0
_REGULARISER = 0.01
_RATE = 1e-2
_ITEMS = 16


def _rows(
    model: QuantizedDenoiser, layer: QuantLayer, trajectories: Points[Any], batch: Any
) -> _Rows | None:
    """The rows of a layer at one point; None if the denoiser does not call the layer there."""
    last: dict[str, Tensor] = {}

    def keep(_: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        last["input"], last["output"] = inputs[0].detach(), output.detach()

    with output_hooks({"layer": layer}, keep):
        trajectories.predict(model.teacher, batch)
        if not last:
            return None
        teacher_output = last["output"]
        with torch.no_grad():
            trajectories.predict(model, batch)
    x = last["input"]
    if x.ndim == 1:
        x, teacher_output = x[None], teacher_output[None]
    timestep = batch.timestep.repeat(len(teacher_output) // len(batch.timestep))
    return x, teacher_output, model.table.index(timestep)


def _joined(layer: QuantLayer, parts: Sequence[_Rows]) -> _Rows:
    """The rows of several points, which may differ in size, e.g. by the length of their prompts."""
    if len({x.shape[1:] for x, _, _ in parts}) > 1:
        if layer.kind == "linear":
            parts = [
                (x.flatten(0, -2), y.flatten(0, -2), index.repeat_interleave(x[0, ..., 0].numel()))
                for x, y, index in parts
            ]
        else:
            # The images of a convolution cannot be cut into rows of one size.
            parts = [part for part in parts if part[0].shape[1:] == parts[0][0].shape[1:]]
    x, teacher_output, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, teacher_output, index


def _learn_layer(
    layer: QuantLayer,
    x: Tensor,
    teacher_output: Tensor,
    index: Tensor,
    iterations: int,
    generator: torch.Generator,
) -> int:
    """Learn the directions of one layer, in place.

    Args:
        layer: layer of the quantised model.
        x: inputs of the layer in the quantised model, `[R, ...]`.
        teacher_output: outputs of the layer in the float model, `[R, ...]`.
        index: indices of the denoising steps, `[R]`.
        iterations: number of Adam updates.
        generator: random generator for the choice of rows.

    Returns:
        Number of weights that are not rounded to nearest.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    scale = layer.spread(layer.weight_scale.detach())
    start = initial_alpha(layer.updated_weight().detach(), scale)
    alpha = layer.alpha = nn.Parameter(start.clone())
    layer.soft_rounding = True
    optimizer = torch.optim.Adam([alpha], lr=_RATE)
    for iteration in range(iterations):
        items = torch.randint(len(x), (min(_ITEMS, len(x)),), generator=generator)
        with step_scope(index[items]):
            out = layer(x[items])
        loss = (out - teacher_output[items]).square().mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError("the loss of its rounding is NaN or infinite")
        rest = (iteration / iterations - _WARM_UP) / (1 - _WARM_UP)
        if rest > 0:
            temperature = _COLD + (_HOT - _COLD) * (1 - rest)
            loss = loss + _REGULARISER * rounding_loss(alpha, temperature) / alpha.numel()
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=[alpha])
        optimizer.step()
    layer.soft_rounding = False
    alpha.requires_grad_(False)
    return int((hard_direction(alpha) != hard_direction(start)).sum())


def learn_rounding(
    model: QuantizedDenoiser,
    trajectories: Points[Any],
    names: list[str],
    *,
    iterations: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Learn the rounding directions of layers, in the order of `names`, in place.

    Args:
        model: quantised denoiser.
        trajectories: source of the layers' inputs.
        names: paths of the layers.
        iterations: number of Adam updates per layer.
        seed: seed for the random choice of items.
        progress: callback with the completed and the total number of layers.

    Returns:
        `rounded_up_share_changed`: share of weights that are no longer rounded to nearest.

    Raises:
        NonFiniteError: a layer's loss is NaN or infinite.
    """
    layers = dict(model.layers())
    changed = total = 0
    for done, name in enumerate(names):
        layer = layers[name]
        seen = [
            _rows(model, layer, trajectories, trajectories.next(slot, done))
            for slot in range(len(trajectories.streams))
        ]
        parts = [rows for rows in seen if rows is not None]
        generator = seeded_generator(seed, "rounding", name)
        with named_errors(name):
            if parts:
                changed += _learn_layer(layer, *_joined(layer, parts), iterations, generator)
            else:
                logger.warning("%s is rounded to nearest: no recorded call reaches it", name)
        total += layer.weight.numel()
        if progress is not None:
            progress(done + 1, len(names))
    return {"rounded_up_share_changed": changed / max(total, 1)}
