"""Observe the calls of a pipeline's denoisers while the pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trtq.calls.form import CallForm, flatten_call
from trtq.calls.processors import attention_processors, changed_processors, kept_processors
from trtq.errors import StepError

__all__ = [
    "RecordedCall",
    "call_until",
    "close_progress_bar",
    "observed",
    "read_timestep",
]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio", "r", "sigma")
"""Names of the timestep in the signatures of diffusers' denoisers, in order of preference."""


@dataclass(frozen=True)
class RecordedCall:
    """One call of a denoiser.

    Attributes:
        denoiser: name of the component.
        form: form of the call.
        tensors: tensors by path.
        processors: attention processors that the pipeline has set during its call, by path.
    """

    denoiser: str
    form: CallForm
    tensors: Mapping[str, Tensor]
    processors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by path."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def copied(self) -> RecordedCall:
        """The call with copies of its tensors, which the pipeline cannot change."""
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return RecordedCall(self.denoiser, self.form, copies, self.processors)


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
        initial = attention_processors(modules[name])

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            form, tensors = flatten_call(module, args, kwargs, frozenset(TIMESTEP_NAMES))
            seen(RecordedCall(name, form, tensors, changed_processors(module, initial)))

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

    with kept_processors(modules.values()), ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_hook(after).remove)
        try:
            call()
        except _EndOfCallError:
            pass
        finally:
            close_progress_bar(pipeline)


def close_progress_bar(pipeline: Any) -> None:
    """Close the progress bar of a pipeline, which an interrupted call leaves open."""
    bar: Any = getattr(pipeline, "_progress_bar", None)
    if bar is not None and hasattr(bar, "close"):
        bar.close()
