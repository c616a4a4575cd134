"""The denoiser calls of a recorded pipeline: those of the user's own call, on their real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtq.artefact.opened import StoredArtefact
from trtq.calls.form import CallForm, result_tensors
from trtq.calls.pipeline import RecordedPipeline
from trtq.calls.processors import with_processors
from trtq.calls.recorder import RecordedCall, observed, read_timestep
from trtq.calls.user_call import UserCall, run_call
from trtq.comparison.call_set import CallSet, Feeds, Outputs
from trtq.comparison.sides import Side
from trtq.engine.arrays import as_array
from trtq.engine.recorded import CallGraph, RecordedDenoiser
from trtq.errors import UsageError

__all__ = ["Part", "RecordedCalls", "record_parts"]


@dataclass(frozen=True)
class RecordedCalls(CallSet):
    """Calls of a denoiser that share a form, in the order of the pipeline's call.

    Attributes:
        tensors: tensors of each call by path, as the pipeline passes them; a graph may need fewer.
        form: form of the calls.
        processors: attention processors that the pipeline has set during the calls, by path.
    """

    tensors: list[Mapping[str, Tensor]]
    form: CallForm
    processors: Mapping[str, Any] = field(default_factory=dict)
    few_images = True
    _places: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        from trtq.comparison.image_snr import call_key

        self._places.update({call_key(feeds): place for place, feeds in enumerate(self.feeds)})

    def few(self, max_images: int) -> RecordedCalls:
        """All calls: their graphs may have fixed sizes, and the calls have few images."""
        return self

    def only(self, index: int) -> RecordedCalls:
        """The call with this index alone."""
        return RecordedCalls(
            [self.feeds[index]],
            [self.timesteps[index]],
            [None],
            [self.tensors[index]],
            self.form,
            self.processors,
        )

    def call(self, denoiser: Any, feeds: Feeds) -> Outputs:
        """The outputs of a denoiser in torch, named as `trtq.exporter.trace_call` names them."""
        from trtq.comparison.image_snr import call_key

        tensors = self.tensors[self._places[call_key(feeds)]]
        with torch.no_grad(), with_processors(denoiser, self.processors):
            result = denoiser(**self.form.rebuild(tensors))
        return {
            f"output_{index}": tensor.detach().cpu().float().numpy()
            for index, tensor in enumerate(result_tensors(result))
        }


@dataclass(frozen=True)
class Part:
    """The calls that are compared by themselves: of one denoiser, with one set of inputs.

    Attributes:
        name: name of the denoiser, with `.form2` and so on for further forms of its calls; "" for the
            only denoiser of a pipeline that was not recorded.
        sides: the reference and the other side, at these calls.
        calls: the calls.
    """

    name: str
    sides: tuple[Side, Side]
    calls: CallSet


def record_parts(sides: tuple[Side, Side]) -> list[Part]:
    """Run the reference through the recorded call, and keep the inputs of its denoisers.

    The call and its random numbers are those of the comparison after an export, see
    `trtq.exporter.call_parity`.

    Args:
        sides: the reference and the other side, of which one or both were recorded.

    Returns:
        One entry per denoiser and form of its calls.

    Raises:
        UsageError: the sides do not have the same denoisers, or one cannot compute a call.
    """
    arguments = _denoisers(sides)
    pipeline = sides[0].source.pipeline
    seen: list[RecordedCall] = []

    modules = {name: getattr(pipeline, name) for name in arguments}
    with observed(modules, lambda call: seen.append(call.copied())):
        run_call(pipeline, _call(sides), 0, "parity")
    groups: dict[Any, list[RecordedCall]] = {}
    graphs: dict[Any, tuple[CallGraph | None, CallGraph | None]] = {}
    for call in seen:
        pair = _graph(sides[0], call), _graph(sides[1], call)
        ranks = tuple((name, tensor.ndim) for name, tensor in call.tensors.items())
        folders = tuple(graph and graph.row.folder for graph in pair)
        key = (call.denoiser, call.form.key, ranks, folders)
        groups.setdefault(key, []).append(call)
        graphs[key] = pair
    if not groups:
        raise UsageError(f"{sides[0].label} does not call {' or '.join(arguments)}")
    names = [key[0] for key in groups]
    parts = []
    for place, (key, calls) in enumerate(groups.items()):
        number = names[: place + 1].count(key[0])
        first, second = (
            side.at(key[0], graph) for side, graph in zip(sides, graphs[key], strict=True)
        )
        name = key[0] if number == 1 else f"{key[0]}.form{number}"
        parts.append(Part(name, (first, second), _calls(calls, arguments[key[0]], graphs[key])))
    return parts


def _denoisers(sides: tuple[Side, Side]) -> dict[str, str]:
    """The denoisers of both sides, and the path of the timestep among the tensors of their calls.

    Raises:
        UsageError: the sides have different denoisers.
    """
    known = [
        {row.denoiser: row.recorded.timestep for row in side.manifest.denoisers}
        for side in sides
        if side.manifest is not None
    ]
    missing = [name for name in known[0] if not hasattr(sides[0].source.pipeline, name)]
    if missing or any(set(names) != set(known[0]) for names in known):
        lists = [
            ", ".join(row.denoiser for row in side.manifest.denoisers)
            if side.manifest is not None
            else type(side.source.pipeline).__name__
            for side in sides
        ]
        raise UsageError(
            f"the denoisers differ: {sides[0].label} has {lists[0]}, and {sides[1].label} has "
            f"{lists[1]}; compare artefacts of one model"
        )
    return known[0]


def _call(sides: tuple[Side, Side]) -> UserCall:
    """The recorded call: that of the graphs, whose sizes may be fixed, else that of the run."""
    side = next(side for side in sides[::-1] if isinstance(side.opened, StoredArtefact))
    source = side.source
    assert isinstance(source, RecordedPipeline)
    call = source.call
    call.check(sides[0].source.pipeline)
    return call


def _graph(side: Side, call: RecordedCall) -> CallGraph | None:
    """The graph that computes a call; None for a side in torch."""
    if side.in_torch:
        return None
    denoiser: RecordedDenoiser = getattr(side.source.pipeline, call.denoiser)
    return denoiser.graph_for(call.form, call.tensors)


def _calls(
    calls: Sequence[RecordedCall],
    timestep: str,
    graphs: tuple[CallGraph | None, CallGraph | None],
) -> RecordedCalls:
    """The calls with the inputs that graphs take.

    Raises:
        UsageError: two graphs take different inputs.
    """
    inputs = [graph.engine.inputs for graph in graphs if graph is not None]
    if len(inputs) > 1 and (differing := set(inputs[0]) ^ set(inputs[1])):
        raise UsageError(
            f"the inputs of both graphs of {calls[0].denoiser} differ: only one takes "
            f"{', '.join(sorted(differing))}; compare artefacts of one model"
        )
    specs = inputs[-1] if inputs else None
    feeds: list[Feeds] = []
    for call in calls:
        if specs is None:
            tensors = call.tensors.items()
            feed = {name: tensor.detach().cpu().float().numpy() for name, tensor in tensors}
        else:
            feed = {name: as_array(call.tensors[name], spec.dtype) for name, spec in specs.items()}
        feeds.append(feed)
    timesteps = [read_timestep(call, timestep) for call in calls]
    tensors_of = [call.tensors for call in calls]
    first = calls[0]
    labels = [None for _ in calls]
    return RecordedCalls(feeds, timesteps, labels, tensors_of, first.form, first.processors)
