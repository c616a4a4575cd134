"""A denoiser that runs on the graphs of its recorded calls, with its diffusers model's interface."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtq.artefact.manifest_rows import GraphRow
from trtq.calls.form import CallForm, flatten_call, rebuild_value
from trtq.calls.processors import (
    attention_processors,
    described_processors,
    processed_modules,
)
from trtq.calls.recorder import TIMESTEP_NAMES
from trtq.engine.base import Engine
from trtq.engine.shared import SharesEngines
from trtq.engine.tensorrt.backends import BACKENDS
from trtq.errors import UsageError
from trtq.quant.stand_in import StandIn

__all__ = ["CallGraph", "RecordedDenoiser"]

_WIDEN = {
    "batch": "export with a call of that batch size: trtq quantize --call FILE.toml",
    "prompt": "quantise with a call of such a prompt: trtq quantize --call FILE.toml",
    "calls": "quantise with a call that has such shapes: trtq quantize --call FILE.toml",
    "size": "export for a range of sizes: trtq export RUN --size SMALLEST:LARGEST",
}

_ENGINE_REMEDIES = _WIDEN | {
    "batch": "build it for more images: trtq build ONNX -o ENGINE --batch-range 1:16",
    "prompt": "shorten the prompt, or run the ONNX folder, which has no limit",
}
"""The same for engines, which have limits that their graphs do not have."""


@dataclass(frozen=True)
class CallGraph:
    """A graph and the calls that it can compute.

    Attributes:
        engine: engine of the graph.
        row: entry of the graph in the manifest.
    """

    engine: Engine
    row: GraphRow

    @property
    def key(self) -> str:
        """Key of the calls' form, see `CallForm.key`."""
        return CallForm(self.row.template).key


class _Output:
    """The result of a denoiser that is called without `return_dict=False`."""

    def __init__(self, values: Any) -> None:
        self.values = values if isinstance(values, tuple) else (values,)

    @property
    def sample(self) -> Any:
        """The prediction."""
        return self.values[0]

    def __getitem__(self, index: Any) -> Any:
        return self.sample if index == "sample" else self.values[index]

    def to_tuple(self) -> tuple[Any, ...]:
        """All values of the result."""
        return tuple(self.values)


class RecordedDenoiser(SharesEngines, StandIn):
    """Replaces a denoiser in a pipeline of diffusers; the pipeline stays as it is.

    Args:
        name: name of the component, for messages.
        model: model of the denoiser's class without memory for its weights; pipelines read its
            attributes.
        graphs: graphs of the recorded calls.
    """

    def __init__(self, name: str, model: nn.Module, graphs: Sequence[CallGraph]) -> None:
        super().__init__()
        # Not a submodule: its parameters have no memory.
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "model_class", type(model))
        self.name = name
        self.graphs: dict[str, list[CallGraph]] = {}
        for graph in graphs:
            self.graphs.setdefault(graph.key, []).append(graph)
        processors = attention_processors(model)
        # Looked up once: the search through a large model takes 10 ms, and every call needs them.
        self._attention = dict(processed_modules(model, processors))
        self._processors = described_processors(processors)
        self._has_return_dict = "return_dict" in inspect.signature(model.forward).parameters
        self.config = model.config
        self.dtype = torch.float32
        self.device = torch.device(graphs[0].engine.device if graphs else "cpu")
        # The hooks of `enable_model_cpu_offload` take the model's device from the first parameter.
        self.place = nn.Parameter(torch.empty(0, device=self.device), requires_grad=False)

    @property
    def engines(self) -> list[Engine]:
        """The engines of all graphs."""
        return [graph.engine for graphs in self.graphs.values() for graph in graphs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result of the diffusers model.

        Raises:
            UsageError: the call differs from every recorded call; the message names the argument.
        """
        form, tensors = flatten_call(self.model, args, kwargs, frozenset(TIMESTEP_NAMES))
        graph = self.graph_for(form, tensors)
        self._check_processors(graph.row)
        feeds = {name: tensors[name] for name in graph.engine.inputs}
        # The result lies where the pipeline's tensors lie; a timestep may lie on the CPU.
        devices = [value.device for value in feeds.values() if value.ndim > 1]
        device = devices[0] if devices else self.device
        results = {
            name: value.to(device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in graph.engine.run_tensors(feeds).items()
        }
        values = rebuild_value(graph.row.output, results, {})
        wrapped = self._has_return_dict and kwargs.get("return_dict") is not False
        return _Output(values) if wrapped else values

    def graph_for(self, form: CallForm, tensors: Mapping[str, Tensor]) -> CallGraph:
        """The graph that computes a call.

        Raises:
            UsageError: there is no such graph.
        """
        graphs = self.graphs.get(form.key)
        if graphs is None:
            raise UsageError(self._unknown(form))
        mismatches = [_mismatch(self.name, graph, tensors) for graph in graphs]
        if None not in mismatches:
            raise UsageError(str(mismatches[0]))
        return graphs[mismatches.index(None)]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module, and the modules of the model: pipelines look for attention among them."""
        yield prefix, self
        inner = self.model.named_modules(memo, prefix, remove_duplicate)
        yield from ((name, module) for name, module in inner if name != prefix)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The only parameter; those of the model have no memory."""
        yield "place", self.place

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        """No buffer; those of the model have no memory."""
        yield from ()

    def _check_processors(self, row: GraphRow) -> None:
        """Raise unless attention is computed as in the graph.

        Raises:
            UsageError: the pipeline or its user has set other attention processors, or other settings.
        """
        expected = self._processors | row.processors
        current = {name: module.processor for name, module in self._attention.items()}
        for name, now in described_processors(current).items():
            if now != expected.get(name, now):
                raise UsageError(
                    f"the graph of {self.name} was traced with the attention processor {expected[name]} "
                    f"at {name}, and the pipeline uses {now}; undo the change, or quantise and export "
                    "with a pipeline that has it"
                )

    def _unknown(self, form: CallForm) -> str:
        """Message about a call that has no graph."""
        known = [graphs[0].row.template for graphs in self.graphs.values()]
        for argument, entry in form.template.items():
            if all(template.get(argument) != entry for template in known):
                recorded = ", ".join(sorted({_shown(template.get(argument)) for template in known}))
                return (
                    f"the graphs of {self.name} were recorded with {argument}={recorded}, and the "
                    f"pipeline passes {_shown(entry)}; quantise and export with such a call: "
                    "trtq quantize --call FILE.toml"
                )
        missing = sorted({key for template in known for key in template} - form.template.keys())
        return (
            f"the pipeline calls {self.name} without {', '.join(missing) or 'an argument'}, which was "
            "recorded; quantise and export with such a call: trtq quantize --call FILE.toml"
        )


def _shown(entry: Mapping[str, Any] | None) -> str:
    """A constant argument for a message."""
    if entry is None:
        return "nothing"
    ((kind, value),) = entry.items()
    text = repr(value) if kind == "value" else f"a {kind}"
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _mismatch(name: str, graph: CallGraph, tensors: Mapping[str, Tensor]) -> str | None:
    """Message about the first size that a graph does not support, or None."""
    for path, spec in graph.engine.inputs.items():
        given = tuple(tensors[path].shape)
        if len(given) != len(spec.shape):
            return (
                f"the graph of {name} takes {path!r} with {len(spec.shape)} axes, got {list(given)}"
            )
        rows = {row.axis: row for row in graph.row.free.get(path, ())}
        for axis, (size, fixed) in enumerate(zip(given, spec.shape, strict=True)):
            row = rows.get(axis)
            if row is None and isinstance(fixed, int) and size != fixed:
                return _fixed_axis(name, graph.row, path, axis, size, fixed)
            too_large = row is not None and row.high is not None and size > row.high
            if row is not None and (size < row.low or too_large):
                limit = f"{row.low} .. {row.high}" if row.high is not None else f"{row.low} or more"
                is_engine = graph.engine.provider in BACKENDS
                what, widen = ("engine", _ENGINE_REMEDIES) if is_engine else ("graph", _WIDEN)
                return (
                    f"axis {axis} of {path!r} of {name} has size {size}; the {what} supports {limit} "
                    f"({row.varies}); to widen it, {widen[row.varies]}"
                )
    return None


def _fixed_axis(name: str, row: GraphRow, path: str, axis: int, size: int, fixed: int) -> str:
    reasons = "; ".join(f"{what}: {reason}" for what, reason in row.fixed.items())
    return (
        f"axis {axis} of {path!r} of {name} has size {size}; the graph supports {fixed} only"
        + (f" ({reasons})" if reasons else "")
        + f"; {_WIDEN['size']}, or {_WIDEN['batch']}"
    )
