"""Find the axes of a denoiser's inputs that vary, by recording calls that differ.

The pipeline is called as the user calls it, and again with other prompts, with a larger batch and at
another size. An axis whose size differs between the recordings is free in the graph; every other axis is
fixed. A variation that changes the structure or the constants of the denoiser's call, e.g. a list with
one entry per image, cannot be supported by the same graph and is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from trtq.calls.form import CallForm
from trtq.calls.recorder import RecordedCall
from trtq.calls.survey import DenoiserCalls, survey
from trtq.calls.user_call import COUNT_ARGUMENTS, UserCall, accepted_arguments
from trtq.errors import TrtqError, UsageError

__all__ = ["FreeAxis", "VariedForm", "varied_forms"]

Varies = Literal["batch", "prompt", "size", "calls"]
_LONGER = "a photograph of a small red house by the lake under a very cloudy sky"
"""A prompt whose number of tokens and of bytes is no multiple of 32: some denoisers pad their texts to a
multiple, and a graph that is traced without padding lacks it for other prompts."""


@dataclass(frozen=True)
class FreeAxis:
    """A free axis of a tensor; see `trtq.artefact.manifest_rows.AxisRow`."""

    axis: int
    varies: Varies
    low: int
    high: int | None
    seen: int


@dataclass
class VariedForm:
    """A form of a denoiser's call with its free axes.

    Attributes:
        denoiser: name of the component.
        form: form of the call.
        tensors: tensors of the last accepted variation of the user's call, by path.
        free: free axes by path.
        fixed: reason why something cannot vary, by `batch`, `prompt` or `size`.
        processors: attention processors that the pipeline has set during its call, by path.
    """

    denoiser: str
    form: CallForm
    tensors: Mapping[str, Tensor]
    free: dict[str, list[FreeAxis]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    processors: Mapping[str, Any] = field(default_factory=dict)


def varied_forms(
    pipeline: Any,
    modules: Mapping[str, nn.Module],
    call: UserCall,
    *,
    largest: tuple[int, int] | None = None,
    fixed: Mapping[str, str] = MappingProxyType({}),
    seed: int = 0,
) -> list[VariedForm]:
    """The forms of all denoiser calls, with the axes that may vary.

    Args:
        pipeline: diffusers pipeline.
        modules: denoisers by name.
        call: the user's call, at its smallest size.
        largest: largest height and width in pixels; None: one size.
        fixed: reason why something is not varied, by `batch`, `prompt` or `size`, or by `calls` for
            shapes that differ between the calls of one run.
        seed: seed of the random numbers.

    Returns:
        One entry per denoiser and form, in the order of the calls; one per combination of shapes if
        `calls` is fixed.

    Raises:
        UsageError: a range of sizes is requested, and the pipeline or its denoiser does not support it.
        ArtefactError: the pipeline cannot be called with the user's arguments.
    """
    base = survey(pipeline, modules, call, seed)
    if "size" in fixed:
        raise UsageError(f"one graph cannot support several sizes: {fixed['size']}")
    forms = {
        (name, key, index): VariedForm(
            name, recorded.form, recorded.tensors, {}, dict(fixed), recorded.processors
        )
        for name, calls in base.items()
        for key, variants in calls.variants.items()
        for index, recorded in enumerate(variants)
        if index == 0 or "calls" in fixed
    }
    if "calls" not in fixed:
        _vary_within(forms, base)
    current, before = call, base
    for what, change in _changes(pipeline, largest).items():
        if what in fixed:
            continue
        try:
            changed = change(current)
            after = survey(pipeline, modules, changed, seed)
            reason = _difference(base, after)
            if reason is None and what == "size" and _shapes(before) == _shapes(after):
                reason = (
                    "the denoiser is called with the same shapes at both sizes; other arguments of the "
                    "pipeline choose its size"
                )
        except TrtqError as err:
            reason = str(err)
        if reason is not None:
            if what == "size":
                raise UsageError(f"one graph cannot support several sizes: {reason}")
            for form in forms.values():
                form.fixed[what] = reason
            continue
        _add(forms, before, after, what)
        current, before = changed, after
    return list(forms.values())


def _changes(
    pipeline: Any, largest: tuple[int, int] | None
) -> dict[Varies, Callable[[UserCall], UserCall]]:
    """Functions that vary a call, by what they vary."""
    accepted = accepted_arguments(pipeline)

    def batch(call: UserCall) -> UserCall:
        for name in COUNT_ARGUMENTS:
            if name in accepted:
                return call.updated({name: 2 * int(call.arguments.get(name) or 1)})
        if call.labels is not None:
            return call.with_labels(2 * call.labels)
        if call.prompts is None:
            raise UsageError("the pipeline has no argument for the number of images")
        prompt = call.arguments["prompt"]
        return call.updated({"prompt": 2 * ([prompt] if isinstance(prompt, str) else prompt)})

    def prompt(call: UserCall) -> UserCall:
        if call.prompts is None:
            raise UsageError("the call has no text prompt")
        return call.with_prompts([_LONGER] * call.prompts)

    def size(call: UserCall) -> UserCall:
        if not {"height", "width"} <= accepted.keys():
            raise UsageError(f"{type(pipeline).__name__} has no arguments height and width")
        assert largest is not None
        return call.updated({"height": largest[0], "width": largest[1]})

    changes: dict[Varies, Callable[[UserCall], UserCall]] = {"prompt": prompt, "batch": batch}
    return changes if largest is None else {"size": size, **changes}


def _shapes(calls: Mapping[str, DenoiserCalls]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of all forms of the denoisers' calls."""
    return [
        recorded.shapes
        for described in calls.values()
        for variants in described.variants.values()
        for recorded in variants
    ]


def _difference(
    base: Mapping[str, DenoiserCalls], other: Mapping[str, DenoiserCalls]
) -> str | None:
    """The first difference of structure or constants between two surveys; None if there is none."""
    for name, calls in base.items():
        if name not in other:
            return f"{name} is not called"
        for key, recorded in calls.first.items():
            match = other[name].first.get(key)
            if match is None:
                return _changed_argument(recorded, list(other[name].first.values()))
            if len(other[name].variants[key]) != len(calls.variants[key]):
                return "the number of different shapes changes"
            for path, tensor in recorded.tensors.items():
                if tensor.ndim != match.tensors[path].ndim:
                    return f"the number of axes of {path} changes"
    return None


def _changed_argument(recorded: RecordedCall, others: list[RecordedCall]) -> str:
    for other in others:
        for argument, entry in recorded.form.template.items():
            if other.form.template.get(argument) != entry:
                return f"{argument!r} of {recorded.denoiser} changes, which is constant in a graph"
    return f"the arguments of {recorded.denoiser} change"


_Forms = Mapping[tuple[str, str, int], VariedForm]


def _vary_within(forms: _Forms, base: Mapping[str, DenoiserCalls]) -> None:
    """Free the axes that differ between calls of one run, e.g. with and without the prompt."""
    for (name, key, _), form in forms.items():
        for path in form.tensors:
            shapes = {call.shapes[path] for call in base[name].variants[key]}
            ranks = {len(shape) for shape in shapes}
            if len(ranks) > 1:
                continue
            for axis, sizes in enumerate(zip(*shapes, strict=True)):
                if len(set(sizes)) > 1:
                    form.free.setdefault(path, []).append(
                        FreeAxis(axis, "calls", 1, None, max(sizes))
                    )


def _add(
    forms: _Forms,
    before: Mapping[str, DenoiserCalls],
    after: Mapping[str, DenoiserCalls],
    what: Varies,
) -> None:
    """Free the axes whose sizes differ between two surveys, and keep the tensors of the second."""
    for (name, key, index), form in forms.items():
        tensors = after[name].variants[key][index].tensors
        for path, tensor in tensors.items():
            rows = form.free.setdefault(path, [])
            known = {row.axis for row in rows}
            old = before[name].variants[key][index].tensors[path].shape
            for axis, (low, high) in enumerate(zip(old, tensor.shape, strict=True)):
                if low == high or axis in known:
                    continue
                # A larger image of another shape may have fewer tokens.
                smallest, greatest = (
                    (min(low, high), max(low, high)) if what == "size" else (1, None)
                )
                # Attention processors may cut the batch into parts.
                if form.processors and what == "batch":
                    smallest = min(low, high)
                rows.append(FreeAxis(axis, what, smallest, greatest, seen=low))
        form.tensors = tensors
    for form in forms.values():
        form.free = {path: rows for path, rows in form.free.items() if rows}
