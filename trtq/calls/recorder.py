"""Observe the calls of a pipeline's denoisers while the pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.calls.form import CallForm, flatten_call
from trtq.calls.user_call import UserCall, run_call
from trtq.errors import QuantizationError, StepError, UsageError

__all__ = [
    "DENOISER_NAMES",
    "DenoiserCalls",
    "RecordedCall",
    "call_until",
    "denoisers_of",
    "observed",
    "read_timestep",
    "repeating",
    "survey",
]

DENOISER_NAMES = (
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "decoder",
    "prior",
)
"""Names under which diffusers' pipelines hold their denoisers."""
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio", "r", "sigma")
"""Names of the timestep in the signatures of diffusers' denoisers, in order of preference."""


@dataclass(frozen=True)
class RecordedCall:
    """One call of a denoiser.

    Attributes:
        denoiser: name of the component.
        form: form of the call.
        tensors: tensors by path.
    """

    denoiser: str
    form: CallForm
    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by path."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


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


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name.

    Raises:
        QuantizationError: the pipeline has none.
    """
    modules = {name: getattr(pipeline, name, None) for name in DENOISER_NAMES}
    present = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    if not present:
        components = ", ".join(sorted(getattr(pipeline, "components", {}))) or "none"
        raise QuantizationError(
            f"{type(pipeline).__name__} has no denoiser: a component {', '.join(DENOISER_NAMES[:-1])} "
            f"or {DENOISER_NAMES[-1]} is required, its components are: {components}"
        )
    return present


def read_timestep(call: RecordedCall, argument: str) -> float:
    """The timestep of a call; the largest if the call has several.

    Raises:
        StepError: the call has no such tensor, or a timestep is NaN.
    """
    tensor = call.tensors.get(argument)
    if tensor is None or not tensor.numel():
        raise StepError(f"{call.denoiser} was called without its timestep {argument!r}")
    value = float(tensor.detach().max())
    if value != value:
        raise StepError(f"{call.denoiser} was called with a timestep that is NaN")
    return value


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], seen: Callable[[RecordedCall], None]
) -> Iterator[None]:
    """Inside the block, call `seen(call)` before each call of a denoiser.

    Args:
        modules: denoisers by name.
        seen: callback with the call; its tensors are those of the pipeline, not copies.
    """

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            form, tensors = flatten_call(module, args, kwargs, frozenset(TIMESTEP_NAMES))
            seen(RecordedCall(name, form, tensors))

        return before

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _EndOfCallError(BaseException):
    """Ends a pipeline's call after the last call of a denoiser."""


def call_until(
    pipeline: Any, modules: Mapping[str, nn.Module], last: int, call: Callable[[], Any]
) -> None:
    """Call a pipeline and end the call after a number of denoiser calls.

    What follows the last denoiser call, such as decoding, is not needed for calibration.

    Args:
        pipeline: diffusers pipeline.
        modules: denoisers by name.
        last: number of denoiser calls after which the call ends.
        call: function that calls the pipeline.
    """
    count = 0

    def after(*_: Any) -> None:
        nonlocal count
        count += 1
        if count >= last:
            raise _EndOfCallError

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_hook(after).remove)
        try:
            call()
        except _EndOfCallError:
            pass
        finally:
            # A pipeline that is interrupted leaves its progress bar open.
            bar: Any = getattr(pipeline, "_progress_bar", None)
            if bar is not None and hasattr(bar, "close"):
                bar.close()


class _Repeated:
    """A forward that computes each form of call once and repeats the result after that.

    The values of a survey do not matter, and denoiser calls take the largest part of a pipeline's time.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward = module.forward
        self.results: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        form, tensors = flatten_call(self.module, args, kwargs, frozenset(TIMESTEP_NAMES))
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        key = f"{form.key} {shapes} {kwargs.get('return_dict')}"
        if key not in self.results:
            self.results[key] = self.forward(*args, **kwargs)
        return _pytree.tree_map(_copy, self.results[key])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def repeating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block, each form of a denoiser's call is computed once, see `_Repeated`."""
    with ExitStack() as stack:
        for module in modules.values():
            patched = module.__dict__.get("forward")
            module.__dict__["forward"] = _forward_like(module, _Repeated(module))
            stack.callback(_restore_forward, module, patched)
        yield


def _forward_like(module: nn.Module, repeated: _Repeated) -> Callable[..., Any]:
    """A function with the signature of the module's forward, which pipelines inspect."""
    import functools

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return repeated(*args, **kwargs)

    return forward


def _restore_forward(module: nn.Module, patched: Any) -> None:
    if patched is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = patched


@torch.no_grad()
def survey(
    pipeline: Any, modules: Mapping[str, nn.Module], call: UserCall, seed: int = 0
) -> dict[str, DenoiserCalls]:
    """Run a pipeline's call once and describe the calls of its denoisers.

    Each denoiser computes only the first call of each form, so a survey takes about as long as one
    denoising step.

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
            copies = {name: tensor.detach().clone() for name, tensor in seen.tensors.items()}
            known.append(RecordedCall(seen.denoiser, seen.form, copies))
        # Only small tensors are kept for every call: the timestep is one of them.
        small = {
            name: tensor.detach().clone()
            if tensor.numel() <= _SMALL
            else torch.empty(tensor.shape, device="meta")
            for name, tensor in seen.tensors.items()
        }
        calls[seen.denoiser].append(RecordedCall(seen.denoiser, seen.form, small))

    with repeating(modules), observed(modules, keep):
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
