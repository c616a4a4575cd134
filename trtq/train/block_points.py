"""Training points of single blocks: their inputs in the quantised model, their targets in the float one.

The points of the whole denoiser are drawn once. For each block the denoiser runs at these points and
stops at the block, in low bits for the block's inputs and in float for its target. As the earlier
blocks are trained already, a block also learns to correct the errors that they leave (as in BRECQ, arXiv
2102.05426, and in AdaRound's sequential reconstruction). Float inputs can be chosen instead; then the
blocks do not depend on each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trtq.calls.copies import copied_tensors
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.timestep import float_scope
from trtq.seeds import seeded_generator
from trtq.train.block_call import BlockCall, StoredCall, rows_of, store_call
from trtq.train.blocks import Block
from trtq.train.points import Points

__all__ = ["BlockInputs", "BlockPoints", "KeptPoints"]

BlockInputs = Literal["quantized", "float"]
"""Origin of a block's inputs: the denoiser with its trained blocks, or the float denoiser."""


class _ReachedError(BaseException):
    """Ends a call of the denoiser at the block that is recorded."""


class _Seen:
    """The calls of one module during one call of the denoiser.

    Attributes:
        inputs: positional and keyword arguments of each call.
        results: values of the result of each call, float32[R, N].
    """

    def __init__(self) -> None:
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.results: list[Tensor] = []


class KeptPoints:
    """The points of a whole denoiser that all of its blocks are trained at.

    Args:
        model: the quantised denoiser.
        trajectories: source of the points.
        count: number of points per micro-batch of an update.
        inputs: see `BlockInputs`.
        seed: seed for the order of the points.
        folder: folder for the calls of one block; an existing one is replaced.
    """

    def __init__(
        self,
        model: QuantizedDenoiser,
        trajectories: Points[Any],
        *,
        count: int,
        inputs: BlockInputs = "quantized",
        seed: int = 0,
        folder: Path,
    ) -> None:
        self.model = model
        self.seed = seed
        self.folder = folder
        self.streams = trajectories.streams
        self._trajectories = trajectories
        self._inputs = inputs
        slots = range(len(trajectories.streams))
        # Points advance together, as the updates of a whole denoiser advance them.
        rounds = [[trajectories.next(slot, index) for slot in slots] for index in range(count)]
        self._points = [[each[slot] for each in rounds] for slot in slots]
        self._calls: dict[str, list[list[int]]] = {}

    def called(self, paths: Sequence[str]) -> list[str]:
        """Sort modules by the order of their first call, and leave out those that are never called.

        Args:
            paths: paths of modules in the denoiser.
        """
        order: list[str] = []
        calls = {path: [[0] * len(points) for points in self._points] for path in paths}
        for slot, points in enumerate(self._points):
            for index, point in enumerate(points):
                for path in self._order_at(point, paths):
                    calls[path][slot][index] += 1
                    if path not in order:
                        order.append(path)
        self._calls = {path: calls[path] for path in order}
        return order

    def _order_at(self, point: Any, paths: Sequence[str]) -> list[str]:
        """The paths of the modules in the order of their calls at a point; one entry per call."""
        order: list[str] = []
        with ExitStack() as stack:
            for path in paths:
                module = self.model.denoiser.get_submodule(path)
                handle = module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
                stack.callback(handle.remove)
            self._trajectories.predict(self.model.teacher, point)
        return order

    def record(self, block: Block, slot: int) -> list[StoredCall]:
        """Write the calls of a block at all points of a micro-batch to files.

        Args:
            block: the block.
            slot: index of the micro-batch in the update.
        """
        stored = []
        for index, point in enumerate(self._points[slot]):
            count = self._calls[block.place][slot][index]
            for number, call in enumerate(self._record_at(block.denoiser, point, count)):
                path = self.folder / f"{slot}-{index}-{number}.safetensors"
                stored.append(store_call(path, call))
        return stored

    @torch.no_grad()
    def _record_at(self, module: nn.Module, point: Any, count: int) -> list[BlockCall]:
        """The calls of a block at one point."""
        if not count:
            return []
        steps: list[Tensor] = []

        def teacher(*args: Any, **kwargs: Any) -> Any:
            steps.append(self.model.step_of(*args, **kwargs))
            with float_scope():
                return self.model.denoiser(*args, **kwargs)

        with _watched(module, count, results=True) as in_float, suppress(_ReachedError):
            self._trajectories.predict(teacher, point)
        given = in_float
        if self._inputs == "quantized":
            with _watched(module, count, results=False) as given, suppress(_ReachedError):
                self._trajectories.predict(self.model, point)
        calls = []
        for (args, kwargs), result in zip(given.inputs, in_float.results, strict=True):
            weight = _row_weights(point.weight, len(result))
            calls.append(BlockCall(args, kwargs, steps[-1], point.timestep, result, weight))
        return calls


@contextmanager
def _watched(module: nn.Module, count: int, *, results: bool) -> Iterator[_Seen]:
    """Inside the block, keep the calls of a module, and end the denoiser's call at the last of them.

    Args:
        module: the module.
        count: number of calls.
        results: whether the last call is computed, too.
    """
    seen = _Seen()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The denoiser may change tensors in place after it has passed them.
        seen.inputs.append(copied_tensors((args, kwargs)))
        if not results and len(seen.inputs) == count:
            raise _ReachedError

    def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        seen.results.append(rows_of(result))
        if len(seen.results) == count:
            raise _ReachedError

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if results:
        handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _row_weights(weight: Tensor, rows: int) -> Tensor:
    """Weights of R rows, `[R]`, from those of the denoiser's B items, whose copies follow each other."""
    if rows % len(weight):
        return weight.mean().expand(rows)
    return weight.repeat(rows // len(weight))


class BlockPoints:
    """The `Points` of one block: its calls at the kept points, in a random order.

    The calls are recorded when the first of them is needed, i.e. after the earlier blocks are trained.
    A context manager, which removes the files.

    Args:
        kept: points of the whole denoiser.
        block: the block.
    """

    def __init__(self, kept: KeptPoints, block: Block) -> None:
        self.streams = kept.streams
        self._kept = kept
        self._block = block
        self._stored: list[list[StoredCall]] = []

    def __enter__(self) -> BlockPoints:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._kept.folder, ignore_errors=True)

    def _record(self) -> None:
        shutil.rmtree(self._kept.folder, ignore_errors=True)
        self._kept.folder.mkdir(parents=True)
        self._stored = [self._kept.record(self._block, slot) for slot in range(len(self.streams))]
        # A micro-batch whose points do not reach the block uses those of another one.
        some = next(calls for calls in self._stored if calls)
        self._stored = [calls or some for calls in self._stored]

    def next(self, slot: int, iteration: int) -> BlockCall:
        """A recorded call; each is used once before one is used again.

        Args:
            slot: index of the micro-batch in the update.
            iteration: index of the update.
        """
        if not self._stored:
            self._record()
        calls = self._stored[slot]
        epoch, place = divmod(iteration, len(calls))
        order = torch.randperm(
            len(calls),
            generator=seeded_generator(
                self._kept.seed, "block", self._block.place, self.streams[slot], epoch
            ),
        )
        return calls[int(order[place])].load(self._kept.model.device)

    def predict(self, student: Callable[..., Any], batch: BlockCall) -> Tensor:
        """The values of the block's result, float32[R, N].

        Args:
            student: callable that computes the student's result.
            batch: the call.
        """
        result: Tensor = student(batch)
        return result

    def state(self) -> dict[str, Tensor]:
        """No tensors: the order of the calls follows from seed and iteration."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore, see `state`."""
