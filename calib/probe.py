"""Operands and sizes of each layer's call, from one call of the denoiser, as a rule without values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trtq.diffusion.sampling import Conditions, predict
from trtq.quant.hooks import output_hooks
from trtq.quant.plan import LayerPlan
from trtq.quant.stored_weight import has_stored_weight, weight_shape

__all__ = ["LayerCall", "observe_calls", "probe", "with_shared_inputs"]

_SMALL, _SMALL_SAMPLE = 5_000_000, 1 << 16
"""Numbers of parameters, and of values of a sample, up to which a call computes with values."""


@dataclass(frozen=True)
class LayerCall:
    """One layer in one call of the denoiser.

    Attributes:
        multiplications: number of multiplications.
        input_values: number of input values of all operands.
        output_values: number of output values.
        input_of: path of the first layer that is called with the same tensor object, possibly the layer
            itself.
    """

    multiplications: int
    input_values: int
    output_values: int
    input_of: str


@torch.no_grad()
def observe_calls(
    denoiser: nn.Module, names: Sequence[str], run: Callable[[], object]
) -> dict[str, LayerCall]:
    """Operands and sizes of each layer's calls while `run` calls the denoiser.

    Args:
        denoiser: float model.
        names: paths of linear layers, convolutions and products.
        run: function that calls the denoiser once, with any arguments.

    Returns:
        The calls by layer, without layers that were not called. Sizes of a layer that is called several
        times are summed, and such a layer shares its input with no other.
    """
    calls: dict[str, LayerCall] = {}
    # Weak references, because the address of a freed tensor may be reused.
    seen: dict[int, tuple[ref[Tensor], str]] = {}
    repeated: set[str] = set()
    modules = dict(denoiser.named_modules())

    def count(name: str, inputs: tuple[Any, ...], output: Tensor) -> None:
        x = inputs[0]
        earlier = seen.get(id(x))
        first = earlier[1] if earlier is not None and earlier[0]() is x else name
        seen[id(x)] = (ref(x), first)
        layer = modules[name]
        weighted = has_stored_weight(layer) or getattr(layer, "weight", None) is not None
        each = math.prod(weight_shape(layer)[1:]) if weighted else x.shape[-1]
        sizes = output.numel() * each, sum(map(torch.numel, inputs)), output.numel()
        if name in calls:
            repeated.add(name)
            before = calls[name]
            sizes = (
                before.multiplications + sizes[0],
                before.input_values + sizes[1],
                before.output_values + sizes[2],
            )
        calls[name] = LayerCall(*sizes, first)

    with output_hooks({name: modules[name] for name in names}, count):
        run()
    return {
        name: replace(call, input_of=name) if {name, call.input_of} & repeated else call
        for name, call in calls.items()
    }


@torch.no_grad()
def probe(
    denoiser: nn.Module,
    names: Sequence[str],
    shape: tuple[int, ...],
    timestep: float,
    conditions: Conditions,
) -> dict[str, LayerCall]:
    """Call the denoiser once, with tensors that have shapes but no values unless the model is small.

    Args:
        denoiser: float model, on the CPU or the meta device.
        names: paths of linear layers, convolutions and products.
        shape: shape (C, H, W) of one sample.
        timestep: a valid timestep of the model.
        conditions: conditions of one image.

    Returns:
        The calls by layer for one image, see `observe_calls`.
    """
    with _values(denoiser, shape):
        return observe_calls(
            denoiser,
            names,
            lambda: predict(denoiser, torch.zeros(1, *shape), timestep, conditions),
        )


def _values(denoiser: nn.Module, shape: tuple[int, ...]) -> AbstractContextManager[object]:
    """Inside the block, tensors have no values unless the model is small, float32 and on the CPU.

    torch's bookkeeping of tensors without values takes half a second even for a model that computes in
    milliseconds.
    """
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    small = math.prod(shape) <= _SMALL_SAMPLE and sum(map(torch.numel, tensors)) <= _SMALL
    plain = all(
        tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64)
        for tensor in tensors
    )
    return nullcontext() if small and plain else FakeTensorMode(allow_non_fake_inputs=True)


def with_shared_inputs(
    plans: Sequence[LayerPlan], calls: Mapping[str, LayerCall]
) -> list[LayerPlan]:
    """Plan a shared input quantiser for layers with the same input and the same bits.

    The usual case is an attention's queries, keys and values: with one quantiser, an engine can run
    their three products as one.

    Args:
        plans: plans of all layers.
        calls: calls of the layers, see `probe`.
    """
    owners: dict[tuple[str, int | None, str, str], str] = {}
    shared = []
    for plan in plans:
        if plan.operands and plan.weight_bits is not None and plan.name in calls:
            place = calls[plan.name].input_of, plan.activation_bits, plan.format, plan.scales
            owner = owners.setdefault(place, plan.name)
            if owner != plan.name:
                plan = replace(plan, input_of=owner)
        shared.append(plan)
    return shared
