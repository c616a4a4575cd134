"""Denoiser calls of several pipelines, joined along the batch into one call.

Calls can be joined if they have the same form and differ only in values along the axes of the batch, and
in their timesteps. A timestep that stands for a whole call becomes one timestep per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.calls.copies import copied_containers
from trtq.calls.form import flatten_call
from trtq.calls.paused import DenoiserCall
from trtq.calls.recorder import TIMESTEP_NAMES, RecordedCall
from trtq.calls.user_call import UserCall
from trtq.calls.variations import varied_forms

__all__ = ["BatchAxes", "Joined", "batch_axes", "flattened"]

_NOT_VARIED = "it does not concern the batch"


def flattened(module: nn.Module, name: str, call: DenoiserCall) -> RecordedCall:
    """A call by the paths of its tensors.

    Args:
        module: the denoiser.
        name: its name.
        call: the call.
    """
    form, tensors = flatten_call(module, call.args, call.kwargs, frozenset(TIMESTEP_NAMES))
    return RecordedCall(name, form, tensors)


@dataclass(frozen=True)
class BatchAxes:
    """Axes of a denoiser's call that grow with the number of images.

    Attributes:
        key: key of the call's form.
        argument: path of the timestep.
        axes: axis of the batch by path; all other tensors are equal for all images.
    """

    key: str
    argument: str
    axes: Mapping[str, int]

    def rows(self, call: RecordedCall) -> int:
        """Number of rows of a call: one per image, or two with guidance in one batch."""
        path = next(iter(self.axes))
        return call.tensors[path].shape[self.axes[path]]

    def fit(self, first: RecordedCall, other: RecordedCall) -> bool:
        """Whether one call can compute both calls."""
        return first.form.key == other.form.key == self.key and all(
            self._fits(path, tensor, other.tensors[path]) for path, tensor in first.tensors.items()
        )

    def _fits(self, path: str, first: Tensor, other: Tensor) -> bool:
        if first.dtype != other.dtype or first.shape != other.shape:
            return False
        if path == self.argument and path not in self.axes:
            return first.numel() == 1
        return path in self.axes or bool(torch.equal(first, other))

    def join(self, calls: Sequence[RecordedCall]) -> dict[str, Tensor]:
        """The tensors of one call that computes all calls, by path.

        The first rows of all calls come first, then their second rows, and so on.

        Args:
            calls: calls that `fit` the first.
        """
        rows = self.rows(calls[0])
        tensors = {}
        for path, tensor in calls[0].tensors.items():
            parts = [call.tensors[path] for call in calls]
            if path in self.axes:
                axis = self.axes[path]
                tensors[path] = torch.stack(parts, axis + 1).flatten(axis, axis + 1)
            elif path == self.argument:
                tensors[path] = torch.cat([part.reshape(1) for part in parts]).repeat(rows)
            else:
                tensors[path] = tensor
        return tensors


def _split(result: Any, count: int, rows: int) -> list[Any]:
    """The results of joined calls.

    Args:
        result: result of the joint call, with the batch as first axis of its tensors.
        count: number of calls.
        rows: number of rows of each call.

    Raises:
        ValueError: the first axis of a tensor is not a multiple of all rows.
    """
    leaves, spec = _pytree.tree_flatten(result)
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            parts.append([leaf] * count)
            continue
        if not leaf.ndim or len(leaf) % (count * rows):
            raise ValueError(
                f"a result of shape {tuple(leaf.shape)} does not have {count * rows} rows"
            )
        shape = (rows, count, len(leaf) // (count * rows), *leaf.shape[1:])
        parts.append([part.flatten(0, 1) for part in leaf.reshape(shape).unbind(1)])
    return [_pytree.tree_unflatten([each[index] for each in parts], spec) for index in range(count)]


@dataclass(frozen=True)
class Joined:
    """Calls that are computed together.

    Attributes:
        args: positional arguments of the joint call.
        kwargs: keyword arguments of the joint call.
        count: number of calls.
        rows: number of rows of each call.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    count: int = 1
    rows: int = 1

    @classmethod
    def of(
        cls, calls: Sequence[DenoiserCall], seen: Sequence[RecordedCall], axes: BatchAxes
    ) -> Joined:
        """Join calls that fit together.

        Args:
            calls: the calls.
            seen: the same calls by the paths of their tensors.
            axes: axes of the batch.
        """
        kwargs = seen[0].form.rebuild(axes.join(seen))
        if "return_dict" in calls[0].kwargs:
            kwargs["return_dict"] = calls[0].kwargs["return_dict"]
        return cls((), kwargs, len(calls), axes.rows(seen[0]))

    def compute(self, denoiser: Callable[..., Any]) -> list[Any]:
        """The results of all calls.

        Args:
            denoiser: the denoiser, or one that is called like it.
        """
        args, kwargs = copied_containers((self.args, self.kwargs))
        result = denoiser(*args, **kwargs)
        return [result] if self.count == 1 else _split(result, self.count, self.rows)


def batch_axes(
    pipeline: Any,
    modules: Mapping[str, nn.Module],
    name: str,
    argument: str,
    call: UserCall,
    seed: int = 0,
) -> dict[str, BatchAxes]:
    """Axes of the batch of every form of a denoiser's call, by the form's key.

    The pipeline is called with one and with two sets of images; each form is computed once.

    Args:
        pipeline: diffusers pipeline.
        modules: denoisers by name.
        name: name of the denoiser.
        argument: path of the timestep.
        call: the user's call.
        seed: seed of the random numbers.

    Returns:
        The axes; a form whose batch is fixed is left out.

    Raises:
        ArtefactError: the pipeline cannot be called with the user's arguments.
    """
    forms = varied_forms(pipeline, modules, call, fixed={"prompt": _NOT_VARIED}, seed=seed)
    by_key = {}
    for form in forms:
        axes = {
            path: row.axis
            for path, rows in form.free.items()
            for row in rows
            if row.varies == "batch"
        }
        if form.denoiser == name and axes and argument in form.tensors:
            key = form.form.key
            by_key[key] = BatchAxes(key, argument, _sample_first(axes, form.tensors))
    return by_key


def _sample_first(axes: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The axes in the order of the call's tensors, whose first is the noisy sample."""
    return {path: axes[path] for path in tensors if path in axes}
