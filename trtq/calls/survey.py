"""A survey of a pipeline's call: which denoisers it calls, how, and at which timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.calls.copies import copied_containers
from trtq.calls.form import flatten_call
from trtq.calls.recorder import TIMESTEP_NAMES, RecordedCall, observed, read_timestep
from trtq.calls.replaced import replaced_forward
from trtq.calls.user_call import UserCall, run_call
from trtq.calls.without_products import noise_like, without_products
from trtq.errors import UsageError

__all__ = ["DenoiserCalls", "repeating", "survey"]


@dataclass(frozen=True)
class DenoiserCalls:
    """The calls of one denoiser during one call of its pipeline.

    Attributes:
        name: name of the component.
        argument: path of the timestep among the tensors.
        timesteps: the timestep of each call; the largest if a call has several.
        first: the first call of each form, with copies of its tensors, by key of the form.
        variants: the first call of each combination of shapes, by key of the form.
    """

    name: str
    argument: str
    timesteps: tuple[float, ...]
    first: Mapping[str, RecordedCall]
    variants: Mapping[str, Sequence[RecordedCall]]


class _Repeated:
    """A forward that computes each form of call once and repeats the result after that."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], *, products: bool = True
    ) -> None:
        self.module = module
        self.forward = forward
        self.products = products
        self.results: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        form, tensors = flatten_call(self.module, args, kwargs, frozenset(TIMESTEP_NAMES))
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        key = f"{form.key} {shapes} {kwargs.get('return_dict')}"
        if key not in self.results:
            self.results[key] = self._compute(args, kwargs)
        return _pytree.tree_map(_copy, self.results[key])

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.products:
            # A model that needs the values, e.g. as an index, computes them.
            with suppress(Exception), without_products(self.module):
                fresh_args, fresh_kwargs = copied_containers((args, kwargs))
                result = self.forward(*fresh_args, **fresh_kwargs)
                return _pytree.tree_map(partial(noise_like, index=len(self.results)), result)
        return self.forward(*args, **kwargs)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def repeating(modules: Mapping[str, nn.Module], *, products: bool = True) -> Iterator[None]:
    """Inside the block, each form of a denoiser's call is computed once and repeated after that.

    Args:
        modules: denoisers by name.
        products: whether the denoisers compute their layers, see `trtq.calls.without_products`; results
            are noise otherwise.
    """
    with ExitStack() as stack:
        for module in modules.values():
            repeated = partial(_Repeated, module, products=products)
            stack.enter_context(replaced_forward(module, repeated))
        yield


@torch.no_grad()
def survey(
    pipeline: Any, modules: Mapping[str, nn.Module], call: UserCall, seed: int = 0
) -> dict[str, DenoiserCalls]:
    """Run a pipeline's call once and describe the calls of its denoisers.

    The values do not matter, and the denoisers take the largest part of a pipeline's time: they compute
    the first call of each form only, and this one without the products of their layers.

    Args:
        pipeline: diffusers pipeline.
        modules: denoisers by name.
        call: arguments of the pipeline's call.
        seed: seed of the random numbers.

    Returns:
        The calls by denoiser; a denoiser that was not called is left out.

    Raises:
        ArtefactError: the pipeline cannot be called with these arguments.
        UsageError: the pipeline calls no denoiser, or calls one without a timestep.
    """
    calls: dict[str, list[RecordedCall]] = {name: [] for name in modules}
    variants: dict[str, dict[str, list[RecordedCall]]] = {name: {} for name in modules}

    def keep(seen: RecordedCall) -> None:
        known = variants[seen.denoiser].setdefault(seen.form.key, [])
        if all(seen.shapes != call.shapes for call in known):
            known.append(seen.copied())
        # Only small tensors are kept for every call: the timestep is one of them.
        small = {
            name: tensor.detach().clone()
            if tensor.numel() <= _SMALL
            else torch.empty(tensor.shape, device="meta")
            for name, tensor in seen.tensors.items()
        }
        calls[seen.denoiser].append(replace(seen, tensors=small))

    with repeating(modules, products=False), observed(modules, keep):
        run_call(pipeline, call, seed, "survey")
    if not any(calls.values()):
        raise UsageError(
            f"{type(pipeline).__name__} does not call its {' or '.join(modules)} with these arguments; "
            "trtq quantises what the pipeline calls"
        )
    return {name: _described(name, rows, variants[name]) for name, rows in calls.items() if rows}


_SMALL = 1 << 16
"""Maximum number of values of a tensor that may hold timesteps, e.g. one per token."""


def _described(
    name: str, calls: Sequence[RecordedCall], variants: Mapping[str, Sequence[RecordedCall]]
) -> DenoiserCalls:
    argument = _timestep_argument(name, calls)
    return DenoiserCalls(
        name,
        argument,
        tuple(read_timestep(call, argument) for call in calls),
        {key: rows[0] for key, rows in variants.items()},
        variants,
    )


def _timestep_argument(name: str, calls: Sequence[RecordedCall]) -> str:
    """Path of the timestep: by its name, else the smallest tensor that changes from call to call.

    Raises:
        UsageError: no argument can be the timestep.
    """
    present = set.intersection(*(set(call.tensors) for call in calls))
    for argument in TIMESTEP_NAMES:
        if argument in present and calls[0].tensors[argument].device.type != "meta":
            return argument
    changing = [
        path
        for path in present
        if calls[0].tensors[path].device.type != "meta"
        and calls[0].tensors[path].numel() <= _SMALL
        and any(not torch.equal(calls[0].tensors[path], call.tensors[path]) for call in calls[1:])
    ]
    if not changing:
        raise UsageError(
            f"{name} is called without a timestep; its arguments are "
            f"{', '.join(calls[0].form.template)}, none of which changes from step to step"
        )
    return min(changing, key=lambda path: (calls[0].tensors[path].numel(), path))
