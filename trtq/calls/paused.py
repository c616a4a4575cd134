"""Calls of a pipeline that pause at every call of one denoiser.

A pipeline calls its denoisers from a loop of its own, and a training loop asks for one point after the
other. Therefore the pipeline runs in a thread, as a coroutine: the thread runs only while
`PausedCalls.next` waits for it, so the two never run at the same time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.calls.user_call import UserCall, run_call
from trtq.errors import QuantizationError
from trtq.quant.timestep import float_scope

__all__ = ["DenoiserCall", "PausedCalls", "PipelineCall", "copied_pipeline"]

_MAX_UNUSED_CALLS = 64
"""Maximum number of successive calls of a pipeline that do not call the denoiser."""


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline with its random numbers.

    Attributes:
        call: arguments of the call.
        number: number of calls of all denoisers, after which the call ends; what follows, such as
            decoding, is not needed.
        seed: seed of the random numbers.
        purpose: use of the random numbers, see `trtq.calls.user_call.run_call`.
    """

    call: UserCall
    number: int
    seed: int
    purpose: tuple[str | int, ...]


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser by its pipeline.

    Attributes:
        args: positional arguments; tensors are copies from before the call.
        kwargs: keyword arguments; tensors are copies from before the call.
        result: the denoiser's result, which the pipeline continues with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _EndOfCallError(BaseException):
    """Ends a pipeline's call after the last call of a denoiser."""


class _ClosedError(BaseException):
    """Ends a pipeline's call since no further point is needed."""


def copied_pipeline(pipeline: Any) -> Any:
    """A copy of a pipeline with schedulers of its own; all other components are shared.

    Several copies can run interleaved, because a call changes only its pipeline object and schedulers.

    Args:
        pipeline: diffusers pipeline; pipelines inside it are copied as well.
    """
    copied = _copied(pipeline, {})
    if hasattr(copied, "set_progress_bar_config"):
        copied.set_progress_bar_config(disable=True)
    return copied


def _copied(pipeline: Any, copies: dict[int, Any]) -> Any:
    """The copy; `copies` holds the copied schedulers and pipelines by the identity of the original."""
    from diffusers import DiffusionPipeline

    copies[id(pipeline)] = copied = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        inner = isinstance(value, DiffusionPipeline)
        if isinstance(value, nn.Module) or not (inner or hasattr(value, "set_timesteps")):
            continue
        if id(value) not in copies:
            copies[id(value)] = _copied(value, copies) if inner else copy.deepcopy(value)
        # The registered classes of the components stay the same.
        copied.__dict__[name] = copies[id(value)]
    return copied


def _copied_tensors(values: Any) -> Any:
    """Nested values with copies of their tensors, which a backward pass may save."""

    def each(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    # A copy that is made in inference mode could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return _pytree.tree_map(each, values)


class PausedCalls:
    """The calls of one denoiser while its pipeline is called again and again.

    Inside the pipeline's calls all quantised layers compute in float, so the results are the teacher's.
    torch's global random numbers inside the calls are separate from those outside.

    Args:
        pipeline: diffusers pipeline; the calls use a copy with schedulers of its own.
        modules: all denoisers of the pipeline by name.
        name: name of the denoiser at whose calls the pipeline pauses.
        draw: function that returns the pipeline's call with a given index, 0, 1, ...
        skip: number of denoiser calls in the first call of the pipeline that run without a pause.
        device: device of the pipeline.

    Attributes:
        index: index of the current call of the pipeline.
        position: number of calls of this denoiser in the current call of the pipeline, including the
            one at which the pipeline pauses.
    """

    def __init__(
        self,
        pipeline: Any,
        modules: Mapping[str, nn.Module],
        name: str,
        draw: Callable[[int], PipelineCall],
        *,
        skip: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pipeline = pipeline
        self._modules = modules
        self._name = name
        self._draw = draw
        self._device = torch.device(device)
        self.index = 0
        self.position = skip
        self._skip = skip
        self._thread: threading.Thread | None = None
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._points: SimpleQueue[DenoiserCall | BaseException] = SimpleQueue()
        self._closed = False
        self._random: list[Tensor] | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._left = 0

    def move(self, index: int, position: int) -> None:
        """Continue after a number of this denoiser's calls in another call of the pipeline.

        The calls before that position are made again at the following `next`.

        Args:
            index: index of the call of the pipeline.
            position: number of calls of this denoiser to skip.
        """
        self.close()
        self.index, self.position = index, position

    def next(self) -> DenoiserCall:
        """Continue until the next call of the denoiser, and return this call.

        After `close`, the current call of the pipeline is made again up to its position.

        Raises:
            ArtefactError: the pipeline cannot be called.
            QuantizationError: the pipeline does not call the denoiser.
        """
        if self._thread is None:
            self._closed, self._skip, self._random = False, self.position, None
        with self._own_random_numbers():
            if self._thread is None:
                self._go, self._points = SimpleQueue(), SimpleQueue()
                self._thread = threading.Thread(
                    target=self._work, daemon=True, name=f"trtq calls of {self._name}"
                )
                self._thread.start()
            else:
                self._go.put(True)
            point = self._points.get()
        if isinstance(point, BaseException):
            self.close()
            raise point
        return point

    def close(self) -> None:
        """End the current call of the pipeline and its thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closed = True
        with self._own_random_numbers():
            self._go.put(False)
            thread.join()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Inside the block, torch's global generators continue where the last block ended."""
        outer = self._random_state()
        if self._random is not None:
            self._set_random_state(self._random)
        try:
            yield
        finally:
            self._random = self._random_state()
            self._set_random_state(outer)

    def _random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self._device.type == "cuda":
            state.append(torch.cuda.get_rng_state(self._device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)

    def _work(self) -> None:
        """Call the pipeline again and again; the thread's target."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            pipeline = copied_pipeline(self._pipeline)
            unused = 0
            with self._hooks(), float_scope():
                while unused < _MAX_UNUSED_CALLS:
                    self.position = 0
                    self._call(pipeline)
                    unused = 0 if self.position else unused + 1
                    self.index, self.position, self._skip = self.index + 1, 0, 0
            raise QuantizationError(
                f"{unused} calls of {type(pipeline).__name__} do not call its {self._name}, which "
                "therefore cannot be fine-tuned; give a call that uses it"
            )
        except _ClosedError:
            pass
        except BaseException as err:
            # The thread that waits for a point raises the error.
            self._points.put(err)

    def _call(self, pipeline: Any) -> None:
        """Call the pipeline once, until the last call of a denoiser."""
        planned = self._draw(self.index)
        self._left = planned.number
        with suppress(_EndOfCallError):
            run_call(pipeline, planned.call, planned.seed, *planned.purpose)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Inside the block, this thread pauses after its calls of the denoiser."""
        here = threading.get_ident()
        denoiser = self._modules[self._name]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == here and self.position >= self._skip:
                self._inputs = _copied_tensors((args, kwargs))

        def after(module: nn.Module, _: tuple[Any, ...], result: Any) -> None:
            if threading.get_ident() != here:
                return
            if self._closed:
                raise _ClosedError
            if module is denoiser:
                self._pause(result)
            self._left -= 1
            if self._left <= 0:
                raise _EndOfCallError

        with ExitStack() as stack:
            stack.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
            for module in self._modules.values():
                stack.callback(module.register_forward_hook(after).remove)
            yield

    def _pause(self, result: Any) -> None:
        """Pass a call of the denoiser to the waiting thread, and wait for `next` or `close`."""
        self.position += 1
        if self.position <= self._skip:
            return
        inputs, self._inputs = self._inputs, ((), {})
        self._points.put(DenoiserCall(*inputs, result))
        if not self._go.get():
            raise _ClosedError
