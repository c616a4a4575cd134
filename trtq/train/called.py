"""Training points: the calls of one denoiser while its pipeline runs.

The pipeline is called as the user calls it, with varied prompts and random numbers, and continues with
the teacher's predictions. So the points lie on the float model's trajectory (EfficientDM, arXiv
2310.03270, eq. 7) for any scheduler, guidance and condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trtq.calls.joined import BatchAxes, Joined, flattened
from trtq.calls.paused import Interception, PausedCalls, PipelineCall
from trtq.calls.recorder import read_timestep
from trtq.calls.user_call import UserCall
from trtq.checkpoint.quiet import quiet_diffusers
from trtq.errors import ArtefactError
from trtq.quant.timestep import float_scope
from trtq.seeds import seeded_generator
from trtq.train.called_batch import CalledBatch, joined_output

__all__ = ["CalledTrajectories"]


class CalledTrajectories:
    """Series of pipeline calls; every point holds one call of the denoiser from each of several series.

    A context manager, which ends the pipeline's calls. Random numbers depend only on seed, purpose,
    stream and index of the pipeline's call.

    Args:
        pipeline: diffusers pipeline, whose denoisers compute as teachers inside `float_scope`.
        modules: all denoisers of the pipeline by name.
        name: name of the denoiser that is fine-tuned.
        argument: path of the timestep in the denoiser's call.
        calls: calls of the pipeline to choose from at random.
        numbers: number of calls of all denoisers during the calls of the pipeline; `calls[i]` makes
            `numbers[i % len(numbers)]` calls.
        length: number of this denoiser's calls during one call of the pipeline.
        slots: number of micro-batches per update in this process.
        stream: first random stream of this process; slot s uses stream `stream + s * stride`.
        stride: number of processes.
        axes: axes of the batch by the key of a call's form, see `trtq.calls.joined`. Calls of a form
            without an entry are computed one by one.
        together: maximum number of calls that are computed together in a micro-batch.
        seed: seed of all random numbers.
        purpose: name that separates the random numbers of different stages.
        staggered: whether the first calls of all series start at different positions.
        weight: function `timestep -> weight` of an error; None: weight 1 at all timesteps.
        device: device of the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        modules: Mapping[str, nn.Module],
        name: str,
        argument: str,
        *,
        calls: Sequence[UserCall],
        numbers: Sequence[int],
        length: int,
        slots: int = 1,
        stream: int = 0,
        stride: int = 1,
        axes: Mapping[str, BatchAxes] = MappingProxyType({}),
        together: int = 1,
        seed: int = 0,
        purpose: str = "efficientdm",
        staggered: bool = True,
        weight: Callable[[float], float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.module = modules[name]
        self.name = name
        self.argument = argument
        self.calls = calls
        self.numbers = numbers
        self.seed = seed
        self.purpose = purpose
        self.streams = [stream + slot * stride for slot in range(slots)]
        self._axes = axes
        self._weight = weight
        self._result: Any = None
        self._device = torch.device(device)
        self._stack = ExitStack()
        self._interception = Interception(modules, name)
        total = slots * stride * together
        self._slots = [
            [
                _Series(
                    PausedCalls(
                        pipeline,
                        self._interception,
                        lambda index, key=key: self.planned_call(key, index),  # type: ignore[misc]
                        device=device,
                    ),
                    skip=key * length // total if staggered else 0,
                )
                for key in range(first * together, (first + 1) * together)
            ]
            for first in self.streams
        ]

    def __enter__(self) -> Self:
        # Calls that run interleaved would restore the settings of the libraries in the wrong order.
        self._stack.enter_context(quiet_diffusers())
        self._stack.enter_context(self._interception)
        for series in self._slots:
            for each in series:
                self._stack.callback(each.paused.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def planned_call(self, key: int, index: int) -> PipelineCall:
        """A call of the pipeline.

        Args:
            key: number of the series.
            index: index of the call in its series.
        """
        generator = seeded_generator(self.seed, self.purpose, "call", key, index)
        chosen = int(torch.randint(len(self.calls), (1,), generator=generator))
        number = self.numbers[chosen % len(self.numbers)]
        return PipelineCall(self.calls[chosen], number, self.seed, (self.purpose, key, index))

    def next(self, slot: int, iteration: int) -> CalledBatch:
        """Continue to the denoiser's next calls in this slot, and return those that fit together.

        Series whose calls do not fit to the others wait for one of the next points.

        Args:
            slot: index of the micro-batch in the update.
            iteration: index of the update; it has no effect.

        Raises:
            ArtefactError: the pipeline cannot be called.
        """
        series = self._slots[slot]
        while late := [each for each in series if each.skip]:
            self._advance(late)
        chosen, batch = self._advance(series)
        for each in chosen:
            each.waited = 0
        for each in series:
            each.waited += 1
        return batch

    def _advance(self, series: Sequence[_Series]) -> tuple[list[_Series], CalledBatch]:
        """Compute the calls that have waited longest and those that fit to them, by the teacher."""
        order = sorted(series, key=lambda each: -each.waited)
        calls = [each.paused.wait() for each in order]
        seen = [flattened(self.module, self.name, call) for call in calls]
        axes = self._axes.get(seen[0].form.key)
        fitting = [
            index
            for index, other in enumerate(seen)
            if index == 0 or (axes is not None and axes.fit(seen[0], other))
        ]
        if axes is None or len(fitting) == 1:
            joined = Joined(calls[0].args, calls[0].kwargs)
        else:
            joined = Joined.of([calls[i] for i in fitting], [seen[i] for i in fitting], axes)
        results = self._teach(joined)
        chosen = [order[index] for index in fitting]
        for each, result in zip(chosen, results, strict=True):
            each.paused.answer(result)
            each.skip = max(0, each.skip - 1)
        teacher = torch.cat([joined_output(result) for result in results])
        timesteps = [read_timestep(seen[index], self.argument) for index in fitting]
        weights = [1.0 if self._weight is None else self._weight(t) for t in timesteps]
        return chosen, CalledBatch(
            joined, teacher.new_tensor(timesteps), teacher, teacher.new_tensor(weights)
        )

    def _teach(self, joined: Joined) -> list[Any]:
        # The teacher predicts in its own precision, independently of the student's.
        autocast = torch.autocast(self._device.type, enabled=False)
        with torch.no_grad(), float_scope(), autocast:
            return joined.compute(self.module)

    def predict(self, student: Callable[..., Any], batch: CalledBatch) -> Tensor:
        """All values of the student's results, float32[B, N].

        Args:
            student: callable that computes the student's prediction.
            batch: the calls.
        """
        return torch.cat([joined_output(result) for result in batch.calls.compute(student)])

    def state(self) -> dict[str, Tensor]:
        """The state of all series.

        `slot` holds index of the pipeline's call and position in this call of every series, int64[B, 2];
        `slot.waited` the number of points that each series has waited, int64[B];
        `slot.series.position.leaf` the results in this call.
        """
        tensors = {}
        for slot, series in enumerate(self._slots):
            places = [[each.paused.index, each.paused.position] for each in series]
            tensors[str(slot)] = torch.tensor(places)
            tensors[f"{slot}.waited"] = torch.tensor([each.waited for each in series])
            for number, each in enumerate(series):
                for position, result in enumerate(each.paused.results):
                    for leaf, tensor in enumerate(_tensors(result)):
                        # Results of joint calls are views of one tensor.
                        tensors[f"{slot}.{number}.{position}.{leaf}"] = tensor.detach().clone()
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue at the positions of `state`.

        Raises:
            ArtefactError: the state belongs to another number of slots or series.
        """
        sizes = [len(state[str(slot)]) for slot in range(len(state)) if str(slot) in state]
        if sizes != [len(series) for series in self._slots]:
            raise ArtefactError(
                f"the checkpoint holds {sum(sizes)} calls in {len(sizes)} micro-batches per update, and "
                f"the recipe has {sum(map(len, self._slots))} in {len(self._slots)}; resume with the "
                "recipe of the checkpoint"
            )
        for slot, series in enumerate(self._slots):
            for number, each in enumerate(series):
                index, position = state[str(slot)][number].tolist()
                each.skip, each.waited = 0, int(state[f"{slot}.waited"][number])
                each.paused.move(index, [])
                results = [
                    self._restored(each, state, f"{slot}.{number}.{place}")
                    for place in range(position)
                ]
                each.paused.move(index, results)

    def _restored(self, series: _Series, state: Mapping[str, Tensor], key: str) -> Any:
        """A result of the state, with the structure of the denoiser's results."""
        if self._result is None:
            call = series.paused.wait()
            (self._result,) = self._teach(Joined(call.args, call.kwargs))
        leaves, spec = _pytree.tree_flatten(self._result)
        count = 0
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[place] = state[f"{key}.{count}"].to(leaf.device)
                count += 1
        return _pytree.tree_unflatten(leaves, spec)


@dataclass
class _Series:
    """One series of pipeline calls.

    Attributes:
        paused: the calls.
        skip: number of denoiser calls that the teacher computes before the first point.
        waited: number of points since the last one with a call of this series.
    """

    paused: PausedCalls
    skip: int = 0
    waited: int = 0


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
