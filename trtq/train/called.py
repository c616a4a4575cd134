"""Training points: the calls of one denoiser while its pipeline runs.

The pipeline is called as the user calls it, with varied prompts and random numbers, and continues with
the teacher's predictions. So the points lie on the float model's trajectory (EfficientDM, arXiv
2310.03270, eq. 7) for any scheduler, guidance and condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from trtq.calls.form import flatten_call, flatten_value
from trtq.calls.paused import PausedCalls, PipelineCall
from trtq.calls.recorder import TIMESTEP_NAMES, RecordedCall, read_timestep
from trtq.calls.user_call import UserCall
from trtq.diffusion.quiet import quiet_diffusers
from trtq.errors import ArtefactError, QuantizationError
from trtq.seeds import seeded_generator

__all__ = ["CalledBatch", "CalledTrajectories", "joined_output"]


@dataclass(frozen=True)
class CalledBatch:
    """One call of a denoiser, with the teacher's prediction.

    A call is one item, whether its rows are images, halves of a guided batch, frames or tokens.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        timestep: the call's timestep, the largest if there are several, `[1]`.
        teacher: all values of the teacher's result, float32[1, N].
        weight: weight of an error at this timestep, `[1]`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    timestep: Tensor
    teacher: Tensor
    weight: Tensor


def joined_output(result: Any) -> Tensor:
    """All values of a denoiser's result in one tensor, float32[1, N].

    Args:
        result: a tensor, or tensors in tuples, lists and mappings; integers are left out.

    Raises:
        QuantizationError: the result contains no tensor of floating-point numbers.
    """
    tensors: dict[str, Tensor] = {}
    flatten_value(result, "output", tensors, {})
    parts = [tensor.flatten().float() for tensor in tensors.values() if tensor.is_floating_point()]
    if not parts:
        raise QuantizationError(
            f"the denoiser returns a {type(result).__name__} without floating-point tensors, so it "
            "cannot be fine-tuned; choose a method without fine-tuning"
        )
    return torch.cat(parts).unsqueeze(0)


class CalledTrajectories:
    """One series of pipeline calls per micro-batch slot; every point is one call of the denoiser.

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
        seed: seed of all random numbers.
        purpose: name that separates the random numbers of different stages.
        staggered: whether the first calls of the slots start at different positions.
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
        self._weight = weight
        self._stack = ExitStack()
        total = slots * stride
        self._slots = [
            PausedCalls(
                pipeline,
                modules,
                name,
                lambda index, key=key: self.planned_call(key, index),  # type: ignore[misc]
                skip=key * length // total if staggered else 0,
                device=device,
            )
            for key in self.streams
        ]

    def __enter__(self) -> Self:
        # Calls that run interleaved would restore the settings of the libraries in the wrong order.
        self._stack.enter_context(quiet_diffusers())
        for slot in self._slots:
            self._stack.callback(slot.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def planned_call(self, stream: int, index: int) -> PipelineCall:
        """A call of the pipeline.

        Args:
            stream: random stream.
            index: index of the call in its stream.
        """
        generator = seeded_generator(self.seed, self.purpose, "call", stream, index)
        chosen = int(torch.randint(len(self.calls), (1,), generator=generator))
        number = self.numbers[chosen % len(self.numbers)]
        return PipelineCall(self.calls[chosen], number, self.seed, (self.purpose, stream, index))

    def next(self, slot: int, iteration: int) -> CalledBatch:
        """Continue to the denoiser's next call in this slot, and return this call.

        Args:
            slot: index of the micro-batch in the update.
            iteration: index of the update; it has no effect.

        Raises:
            ArtefactError: the pipeline cannot be called.
        """
        call = self._slots[slot].next()
        form, tensors = flatten_call(self.module, call.args, call.kwargs, frozenset(TIMESTEP_NAMES))
        timestep = read_timestep(RecordedCall(self.name, form, tensors), self.argument)
        teacher = joined_output(call.result)
        weight = 1.0 if self._weight is None else self._weight(timestep)
        return CalledBatch(
            call.args,
            call.kwargs,
            teacher.new_tensor([timestep]),
            teacher,
            teacher.new_tensor([weight]),
        )

    def predict(self, student: Callable[..., Any], batch: CalledBatch) -> Tensor:
        """All values of the student's result, float32[1, N].

        Args:
            student: callable that computes the student's prediction.
            batch: arguments of the denoiser.
        """
        return joined_output(student(*batch.args, **batch.kwargs))

    def state(self) -> dict[str, Tensor]:
        """Index of the pipeline's call and position in this call of every slot, int64[2] each."""
        return {
            str(index): torch.tensor([slot.index, slot.position])
            for index, slot in enumerate(self._slots)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue at the positions of `state`; the teacher repeats the calls before them.

        Raises:
            ArtefactError: the state belongs to another number of slots.
        """
        for index, slot in enumerate(self._slots):
            if str(index) not in state:
                raise ArtefactError(
                    f"the checkpoint holds {len(state)} micro-batches per update, and the recipe has "
                    f"{len(self._slots)}; resume with the recipe of the checkpoint"
                )
            call, position = state[str(index)].tolist()
            slot.move(call, position)
