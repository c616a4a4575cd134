"""Calls of a pipeline that pause at every call of one denoiser, whose result somebody else computes.

A pipeline calls its denoisers from a loop of its own. Here the loop runs in a thread, as a coroutine: at
each call of the denoiser the thread waits for a result, and it runs only while `PausedCalls.wait` waits
for its next call. So a caller can collect the calls of several pipelines and compute them together.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self

import torch
from torch import Tensor, nn

from trtq.calls.copies import copied_pipeline, copied_tensors
from trtq.calls.processors import kept_processors
from trtq.calls.replaced import replaced_forward
from trtq.calls.user_call import UserCall, run_call
from trtq.errors import QuantizationError
from trtq.quant.timestep import float_scope

__all__ = ["DenoiserCall", "Interception", "PausedCalls", "PipelineCall"]

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
    """A call of a denoiser by its pipeline, which waits for the result.

    Attributes:
        args: positional arguments; tensors are copies.
        kwargs: keyword arguments; tensors are copies.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _EndOfCallError(BaseException):
    """Ends a pipeline's call after the last call of a denoiser."""


class _ClosedError(BaseException):
    """Ends a pipeline's call since no further point is needed."""


class Interception:
    """Passes the calls of a pipeline's denoisers to the `PausedCalls` of the calling thread.

    A context manager; inside it, calls from other threads are computed as usual.

    Args:
        modules: all denoisers of the pipeline by name.
        name: name of the denoiser at whose calls the pipelines pause.
    """

    def __init__(self, modules: Mapping[str, nn.Module], name: str) -> None:
        self.name = name
        self._modules = modules
        self._threads: dict[int, PausedCalls] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(kept_processors(self._modules.values()))
        for name, module in self._modules.items():
            paused = name == self.name
            replacement = functools.partial(self._intercepted, paused)
            self._stack.enter_context(replaced_forward(module, replacement))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def calls_of(self, paused: PausedCalls) -> Iterator[None]:
        """Inside the block, the denoiser calls of this thread belong to `paused`."""
        here = threading.get_ident()
        self._threads[here] = paused
        try:
            yield
        finally:
            del self._threads[here]

    def _intercepted(self, paused: bool, forward: Callable[..., Any]) -> Callable[..., Any]:
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            owner = self._threads.get(threading.get_ident())
            if owner is None:
                return forward(*args, **kwargs)
            result = owner.computed(args, kwargs) if paused else forward(*args, **kwargs)
            owner.count()
            return result

        return intercepted


class PausedCalls:
    """The calls of one denoiser while its pipeline is called again and again.

    The pipeline's other denoisers compute in float. torch's global random numbers inside the calls are
    separate from those outside.

    Args:
        pipeline: diffusers pipeline; the calls use a copy with schedulers of its own.
        interception: interception of the pipeline's denoisers; it is entered before the first `wait`.
        draw: function that returns the pipeline's call with a given index, 0, 1, ...
        device: device of the pipeline.

    Attributes:
        index: index of the current call of the pipeline.
        results: the results of the denoiser in the current call of the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        interception: Interception,
        draw: Callable[[int], PipelineCall],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pipeline = pipeline
        self._interception = interception
        self._draw = draw
        self._device = torch.device(device)
        self.index = 0
        self.results: list[Any] = []
        self._repeated = 0
        self._thread: threading.Thread | None = None
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._points: SimpleQueue[DenoiserCall | BaseException] = SimpleQueue()
        self._waiting: DenoiserCall | None = None
        self._random: list[Tensor] | None = None
        self._left = 0

    @property
    def position(self) -> int:
        """Number of results of the denoiser in the current call of the pipeline."""
        return len(self.results)

    def move(self, index: int, results: Sequence[Any]) -> None:
        """Continue another call of the pipeline, after the denoiser has returned these results.

        Args:
            index: index of the call of the pipeline.
            results: results that the call receives again at the following `wait`.
        """
        self.close()
        self.index, self.results = index, list(results)

    def wait(self) -> DenoiserCall:
        """Continue until the next call of the denoiser, and return this call.

        A call that has no result yet is returned again. After `close`, the current call of the pipeline
        is made again with the results that it has received.

        Raises:
            ArtefactError: the pipeline cannot be called.
            QuantizationError: the pipeline does not call the denoiser.
        """
        if self._waiting is not None:
            return self._waiting
        with self._own_random_numbers():
            if self._thread is None:
                self._repeated, self._random = 0, None
                self._go, self._points = SimpleQueue(), SimpleQueue()
                self._thread = threading.Thread(
                    target=self._work, daemon=True, name=f"trtq calls of {self._interception.name}"
                )
                self._thread.start()
            else:
                self._go.put(True)
            point = self._points.get()
        if isinstance(point, BaseException):
            self.close()
            raise point
        self._waiting = point
        return point

    def answer(self, result: Any) -> None:
        """Give the waiting call its result; the pipeline continues at the next `wait`."""
        assert self._waiting is not None
        self._waiting = None
        self.results.append(result)

    def close(self) -> None:
        """End the current call of the pipeline and its thread."""
        thread, self._thread, self._waiting = self._thread, None, None
        if thread is None:
            return
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
            with self._interception.calls_of(self), float_scope():
                while unused < _MAX_UNUSED_CALLS:
                    self._call(pipeline)
                    unused = 0 if self.results else unused + 1
                    self.index, self.results, self._repeated = self.index + 1, [], 0
            name = self._interception.name
            raise QuantizationError(
                f"{unused} calls of {type(pipeline).__name__} do not call its {name}, which therefore "
                "cannot be fine-tuned; give a call that uses it"
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

    def computed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call of the denoiser, for the thread of the pipeline."""
        if self._repeated == len(self.results):
            self._points.put(DenoiserCall(*copied_tensors((args, kwargs))))
            if not self._go.get():
                raise _ClosedError
        self._repeated += 1
        # The pipeline may change a result in place.
        return copied_tensors(self.results[self._repeated - 1])

    def count(self) -> None:
        """Count a call of a denoiser; the last one ends the pipeline's call."""
        self._left -= 1
        if self._left <= 0:
            raise _EndOfCallError
