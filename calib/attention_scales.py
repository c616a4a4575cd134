"""Choice of the factors of channels inside attention, see `trtq.quant.attention_channels`.

The factors have SmoothQuant's form (arXiv 2211.10438, eq. 4), `c = a^alpha / b^(1 - alpha)`. `a` is the
mean over steps of each channel's largest absolute value: of the values, or of the queries. `b` is the
largest absolute weight that reads the channel in `to_out.0`, or the mean over steps of the largest key.
With alpha = 1, which is best for the values if their product is the only one that rounds them, all
channels of the values get the same range.

The choice is the alpha with the smallest error of the attention's output, behind `to_out.0`, on sampled
tokens with both products at their planned bits, or no factors. The layers absorb the factors, which
therefore cost nothing. `to_out.0` does not suffer: a smoothing of its input follows, and multiplies with
these factors to the same total for each alpha.

Letters: S recorded steps; H heads; R, R' tokens; D channels of a head; C = H D; N out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from trtq.calib.attention_rows import AttentionRows, outlier_ratio
from trtq.calib.input_rows import InputRows
from trtq.calib.transform_error import TransformChoice, some_outputs
from trtq.calib.transforms import GAIN_OF_ROWS, smoothing_factors
from trtq.limits import NOT_SCALED
from trtq.quant.attention_channels import AttentionProduct, attention_products, scale_channels
from trtq.quant.input_transform import TransformTensors
from trtq.quant.plan import LayerPlan, named_errors
from trtq.quant.product import QuantProduct
from trtq.quant.ranges import row_qparams
from trtq.quant.timestep import TimestepTable
from trtq.seeds import seeded_generator

__all__ = ["scale_attention"]

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_VALUES = 4096


def scale_attention(
    denoiser: nn.Module,
    layers: Sequence[LayerPlan],
    attention: Mapping[str, AttentionRows],
    inputs: Mapping[str, InputRows],
    options: TransformChoice,
) -> tuple[list[LayerPlan], dict[str, InputRows]]:
    """Choose the factors of the channels of low-bit attention products, and apply them, in place.

    Args:
        denoiser: the float model; its function stays the same.
        layers: plans of all layers.
        attention: recorded tokens by path of the attention module.
        inputs: recorded rows by layer that owns a quantiser.
        options: what may be chosen.

    Returns:
        The plans, with outlier ratios of the products, the chosen factors, and the origin of the scales
        where the plans leave it open; and the recorded rows as the changed model would give them.
    """
    plans = {plan.name: plan for plan in layers}
    rows_of = dict(inputs)
    # In module order, the two products of an attention follow each other.
    for scores, mix in pairwise(list(attention_products(denoiser))):
        rows = attention.get(mix.attention)
        if scores.attention != mix.attention or rows is None or not rows.complete:
            continue
        output = denoiser.get_submodule(f"{mix.attention}.to_out.0")
        if not isinstance(output, nn.Linear):
            continue
        error = _AttentionError(rows, plans[scores.name], plans[mix.name], output.weight, options)
        for product in (mix, scores):
            plan = plans[product.name]
            if not plan.quantized:
                continue
            with named_errors(product.name):
                ratio = max(outlier_ratio(error.channel_max[part]) for part in _parts(product))
                plan = replace(plan, outlier_ratio=round(ratio, 2))
                obstacle = _obstacle(denoiser, product, plans, options)
                chosen = None if obstacle else error.choose(product)
            if obstacle:
                plan = replace(plan, reason=f"{plan.reason}; {NOT_SCALED}{obstacle}")
            if chosen is not None:
                scale_channels(denoiser, product.name, chosen)
                plan = replace(plan, smooth=True)
                if product.after in rows_of:
                    rows_of[product.after] = _scaled(rows_of[product.after], chosen)
            if plan.free_scales and error.has_rows(product):
                plan = replace(plan, scales="row")
            plans[product.name] = plan
    return [plans[plan.name] for plan in layers], rows_of


def _parts(product: AttentionProduct) -> tuple[int, ...]:
    """Places in `AttentionRows.channel_max` of the operands whose channels are scaled."""
    return (2,) if product.is_mix else (0, 1)


def _obstacle(
    denoiser: nn.Module,
    product: AttentionProduct,
    plans: Mapping[str, LayerPlan],
    options: TransformChoice,
) -> str | None:
    """The reason why the channels of a product stay as they are; None: they may be scaled."""
    if not options.smooth:
        return "smoothing is off"
    for name in (product.name, *product.layers):
        if name in plans and not plans[name].may_smooth:
            return f"the policy allows no smoothing of {name.removeprefix(product.attention + '.')}"
    return product.obstacle(denoiser)


def _scaled(entry: InputRows, tensors: TransformTensors) -> InputRows:
    """Recorded rows whose channels are multiplied by the factors `1 / c`."""
    inverse = tensors.inv_channels
    assert inverse is not None
    return replace(entry, rows=entry.rows * inverse, channel_max=entry.channel_max * inverse)


class _AttentionError:
    """Relative error of an attention's output, behind `to_out.0`, on sampled tokens.

    Masks of the attention are ignored. The weight of `to_out.0` and its input are in float.

    Args:
        rows: recorded tokens.
        scores: plan of the product of queries and keys.
        mix: plan of the product of probabilities and values.
        weight: weight of `to_out.0`, `[N, C]`.
        options: methods that determine ranges.

    Attributes:
        channel_max: largest values of queries, keys and values, `[3, T, C]`, see `AttentionRows`.
    """

    def __init__(
        self,
        rows: AttentionRows,
        scores: LayerPlan,
        mix: LayerPlan,
        weight: Tensor,
        options: TransformChoice,
    ) -> None:
        self.channel_max = rows.channel_max
        self._tokens = rows.stacked()
        self._plans = {True: mix, False: scores}
        self._options = options
        self._weight = weight.detach().float().cpu()
        self._outputs = some_outputs(self._weight)
        self._exact = self._output(*self._tokens, low_bit=False)

    @torch.no_grad()
    def choose(self, product: AttentionProduct) -> TransformTensors | None:
        """The factors with the smallest error; None: no factors are better than all.

        The tokens are scaled by the chosen factors, so a later choice starts from them.
        """
        smallest, chosen, tokens = self._error(self._tokens, None), None, self._tokens
        for candidate in self._candidates(product):
            scaled = _scaled_tokens(self._tokens, candidate, product)
            error = self._error(scaled, candidate if product.is_mix else None)
            if error < smallest:
                smallest, chosen, tokens = error, candidate, scaled
        if chosen is not None:
            self._tokens = tokens
            if product.is_mix:
                assert chosen.inv_channels is not None
                self._outputs = self._outputs / chosen.inv_channels
        return chosen

    @torch.no_grad()
    def has_rows(self, product: AttentionProduct) -> bool:
        """Whether scales per row lower the error of a product enough; if so, they are kept."""
        before, plan = self._error(self._tokens, None), self._plans[product.is_mix]
        self._plans[product.is_mix] = replace(plan, scales="row")
        if self._error(self._tokens, None) < GAIN_OF_ROWS * before:
            return True
        self._plans[product.is_mix] = plan
        return False

    def _candidates(self, product: AttentionProduct) -> Iterator[TransformTensors]:
        largest = self.channel_max.mean(1)
        if product.is_mix:
            source, reader = largest[2], self._weight
        else:
            source, reader = largest[0], largest[1][None]
        for alpha in _ALPHAS if product.is_mix else (0.0, *_ALPHAS):
            yield TransformTensors.of_channels(smoothing_factors(source, [reader], alpha))

    def _error(
        self, tokens: tuple[Tensor, Tensor, Tensor], of_values: TransformTensors | None
    ) -> float:
        outputs = self._outputs
        if of_values is not None and of_values.inv_channels is not None:
            outputs = outputs / of_values.inv_channels
        difference = self._output(*tokens, outputs=outputs) - self._exact
        noise, power = (each.square().mean((1, 2)) for each in (difference, self._exact))
        # Each step counts alike, however large its values are.
        return float((noise / power.clamp_min(1e-30)).mean())

    @torch.no_grad()
    def _output(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        outputs: Tensor | None = None,
        *,
        low_bit: bool = True,
    ) -> Tensor:
        """query[S, H, R, D], key and value[S, H, R', D] -> some outputs of the attention, [S, R, N]."""
        transposed = key.transpose(-1, -2)
        if low_bit:
            scores = self._product(query, transposed, self._plans[False])
            probabilities = (scores * query.shape[-1] ** -0.5).softmax(-1)
            mixed = self._product(probabilities, value, self._plans[True])
        else:
            mixed = (query @ transposed * query.shape[-1] ** -0.5).softmax(-1) @ value
        outputs = self._outputs if outputs is None else outputs
        result: Tensor = mixed.transpose(1, 2).flatten(2) @ outputs.T
        return result

    def _product(self, left: Tensor, right: Tensor, plan: LayerPlan) -> Tensor:
        """The product `left[S, ...] @ right[S, ...]` at its planned bits, with ranges of each step."""
        if plan.activation_bits is None or plan.right_bits is None:
            return left @ right
        steps = len(left)
        bits = plan.activation_bits, plan.right_bits
        product = QuantProduct(TimestepTable(range(steps)), *bits, scales=plan.scales)
        for quantizer, x in ((product.left, left), (product.right, right)):
            flat = x.flatten()[None] if self._options.static else x.flatten(1)
            generator = seeded_generator(0, "values for ranges")
            drawn = torch.randperm(flat.shape[1], generator=generator)[:_VALUES]
            scale, zero_point = row_qparams(
                flat[:, drawn],
                flat.amin(1),
                flat.amax(1),
                quantizer.bits,
                self._options.activations,
                symmetric=quantizer.symmetric,
                contain_zero=True,
            )
            quantizer.set_range(scale.expand(steps), zero_point.expand(steps))
        result: Tensor = product(left, right, torch.arange(steps))
        return result


def _scaled_tokens(
    tokens: tuple[Tensor, Tensor, Tensor], tensors: TransformTensors, product: AttentionProduct
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `[S, H, R, D]`, with scaled channels."""
    query, key, value = tokens
    assert tensors.inv_channels is not None
    inverse = tensors.inv_channels.reshape(query.shape[1], 1, -1)
    if product.is_mix:
        return query, key, value * inverse
    return query * inverse, key / inverse, value
