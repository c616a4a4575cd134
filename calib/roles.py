"""Roles of layers, observed in one call of the denoiser: input, output, embeddings, not called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trtq.quant.hooks import input_hooks
from trtq.quant.plan import layer_kind, quantizable_layers

__all__ = ["LayerRoles", "observe_roles"]

_SAMPLE, _OTHER = 1, 2
"""Origins of values: the sample, and other arguments with more than one row per image, e.g. a text."""


@dataclass(frozen=True)
class LayerRoles:
    """Roles of a denoiser's layers in one call.

    A layer is on the sample path if its input depends on the sample, the first argument of the
    denoiser, and has more than one row per image.

    Attributes:
        first: the linear layer or convolution that is called first on the sample path; None: there is
            no such layer.
        last: the linear layer or convolution that is called last on the sample path; None: there is no
            such layer.
        embeddings: linear layers that are called with one row per image, or that depend only on
            arguments with one row per image, e.g. a timestep per token: embeddings and modulations.
        calls: number of calls of each called layer.
        rows: lengths of the first axis of each called layer's inputs, in ascending order.
        not_called: layers that the call does not reach.
        batch: number of images in the call.
    """

    first: str | None
    last: str | None
    embeddings: frozenset[str]
    calls: Mapping[str, int]
    rows: Mapping[str, tuple[int, ...]]
    not_called: frozenset[str]
    batch: int

    def rows_are_images(self, layers: Collection[str]) -> bool:
        """Whether the rows of all these layers are the images of the batch, in every call.

        Only then can each image have its own denoising step.

        Args:
            layers: paths of layers; layers that were not called do not count.
        """
        return all(self.rows.get(layer, (self.batch,)) == (self.batch,) for layer in layers)


@dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        layer: path of the layer.
        length: length of the input's first axis.
        rows: number of vectors or positions in the input, in all images together.
        node: autograd's node of the input; None: the input depends on no marked argument.
    """

    layer: str
    length: int
    rows: int
    node: Any


def observe_roles(denoiser: nn.Module, run: Callable[[], object], batch: int) -> LayerRoles:
    """Roles of all linear layers, convolutions and products, from one call of the denoiser.

    Autograd records which arguments an input depends on. If it cannot, e.g. since the denoiser converts
    values to numpy, the numbers of rows alone decide.

    Args:
        denoiser: float model; it is not changed.
        run: function that calls the denoiser once, with any arguments; it may be called twice.
        batch: number of images in the call, e.g. 2 for one image with guidance in one batch.
    """
    layers = quantizable_layers(denoiser)
    try:
        # Only the graph is needed: the values for a backward pass, among them all weights, are not kept.
        empty = torch.empty(0)
        nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda _: empty, lambda kept: kept)
        with _marked_arguments(denoiser, batch) as marks, nothing_kept:
            calls = _observe(layers, run)
        origins = _origins(calls, marks)
    except RuntimeError:
        # An error that is not due to autograd is raised again here.
        with torch.no_grad():
            calls = _observe(layers, run)
        origins = []
    if not any(origin & _SAMPLE for origin in origins):
        origins = [_SAMPLE] * len(calls)
    kinds = {name: layer_kind(module) for name, module in layers.items()}
    path = [
        call.layer
        for call, origin in zip(calls, origins, strict=True)
        if call.rows > batch and origin & _SAMPLE and kinds[call.layer] != "product"
    ]
    others = {
        call.layer
        for call, origin in zip(calls, origins, strict=True)
        if (call.rows > batch and origin) or kinds[call.layer] != "linear"
    }
    called = [call.layer for call in calls]
    return LayerRoles(
        first=path[0] if path else None,
        last=path[-1] if path else None,
        embeddings=frozenset(called) - others,
        calls={name: called.count(name) for name in dict.fromkeys(called)},
        rows={
            name: tuple(sorted({call.length for call in calls if call.layer == name}))
            for name in dict.fromkeys(called)
        },
        not_called=frozenset(layers) - frozenset(called),
        batch=batch,
    )


def _observe(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[_Call]:
    """The calls of the layers during `run`, in order."""
    calls: list[_Call] = []

    def keep(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs:
            x = inputs[0]
            length = len(x) if x.ndim else 1
            calls.append(_Call(name, length, _rows(layers[name], x), x.grad_fn))

    with input_hooks(layers, keep):
        run()
    return calls


def _rows(layer: nn.Module, x: Tensor) -> int:
    """Number of vectors or positions that a layer processes, in all images together."""
    if isinstance(layer, nn.Linear) or x.ndim < 2:
        return x.numel() // max(x.shape[-1] if x.ndim else 1, 1)
    return x.numel() // max(x.shape[1], 1)


@contextmanager
def _marked_arguments(denoiser: nn.Module, batch: int) -> Iterator[dict[Any, int]]:
    """Inside the block, autograd follows the arguments of the denoiser that have several rows per image.

    Args:
        denoiser: float model.
        batch: number of images in a call.

    Yields:
        The origin of each marked argument by autograd's node, which the block's calls fill in.
    """
    marks: dict[Any, int] = {}
    enabled: list[bool] = []
    first = next(iter(inspect.signature(denoiser.forward).parameters), None)

    def mark(value: Any, origin: int) -> Any:
        def each(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.ndim:
                return leaf
            if origin == _OTHER and leaf.numel() <= batch * leaf.shape[-1]:
                return leaf
            # A copy, since autograd forbids changing a leaf in place.
            copy = leaf.detach().requires_grad_().clone()
            marks[copy.grad_fn] = origin
            return copy

        return pytree.tree_map(each, value)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # `run` may turn gradients off around the call; `after` turns them off again.
        enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        new_args = tuple(
            mark(value, _OTHER if place else _SAMPLE) for place, value in enumerate(args)
        )
        return new_args, {
            name: mark(value, _SAMPLE if name == first else _OTHER)
            for name, value in kwargs.items()
        }

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(enabled.pop())
        return pytree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output
        )

    handles = (
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after),
    )
    try:
        # Nothing is differentiated, so autograd need not keep values. The block restores the mode of
        # gradients if the call raises.
        hooks = torch.autograd.graph.saved_tensors_hooks(_drop, _dropped)
        with torch.set_grad_enabled(torch.is_grad_enabled()), hooks:
            yield marks
    finally:
        for handle in handles:
            handle.remove()


def _drop(_: Tensor) -> None:
    return None


def _dropped(_: Any) -> Tensor:
    raise RuntimeError("roles are observed without values for a backward pass")


def _origins(calls: Iterable[_Call], marks: Mapping[Any, int]) -> list[int]:
    """The origins of each call's input, combined with `|`; 0: it depends on no marked argument."""
    known = dict(marks)
    for call in calls:
        stack = [] if call.node is None else [call.node]
        while stack:
            node = stack[-1]
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            unknown = [parent for parent in parents if parent not in known]
            if node not in known and unknown:
                stack.extend(unknown)
                continue
            stack.pop()
            if node not in known:
                known[node] = 0
                for parent in parents:
                    known[node] |= known[parent]
    return [0 if call.node is None else known[call.node] for call in calls]
