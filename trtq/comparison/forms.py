"""What computes a side: the artefact as it is, with outputs of its layers, or with layers in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from trtq.artefact.opened import Checkpoint
from trtq.comparison.call_set import CallSet, Feeds
from trtq.comparison.sides import Side
from trtq.engine.base import Engine
from trtq.engine.open import open_engine
from trtq.errors import UsageError
from trtq.graph.file import MODEL_FILE, save_rewritten
from trtq.graph.low_bit_layers import layers_to_float, mark_inputs, mark_layers
from trtq.graph.runtimes.prepare import load_graph, prepare
from trtq.quant.attention_channels import scale_channels, transforms_of
from trtq.quant.float_form import float_form
from trtq.quant.hooks import captured_outputs
from trtq.quant.input_transform import TransformTensors
from trtq.quant.structure import Structure, apply_structure, replace_module

__all__ = [
    "Form",
    "float_graph",
    "float_layers",
    "marked_form",
    "model_in",
    "outputs_of",
    "side_form",
    "structured",
    "with_floats",
]


@dataclass(frozen=True)
class Form:
    """What computes a side.

    Attributes:
        side: the side.
        denoiser: the denoiser in torch; None for a graph or an engine.
        engine: the opened graph or engine; None for a denoiser in torch.
        layers: layers whose outputs are outputs of the whole.
    """

    side: Side
    denoiser: nn.Module | None = None
    engine: Engine | None = None
    layers: tuple[str, ...] = ()

    def runner(self, calls: CallSet) -> Any:
        """A runner of polygraphy."""
        from trtq.comparison.runners import TorchRunner, engine_runner

        if self.engine is not None:
            return engine_runner(self.side.label, self.engine)
        assert self.denoiser is not None

        def call(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self.denoiser is not None
            return outputs_of(self.denoiser, calls, dict(feeds), self.layers)

        return TorchRunner(self.side.label, calls.inputs, call)


def outputs_of(
    denoiser: nn.Module, calls: CallSet, feeds: Feeds, layers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The prediction of a denoiser in torch and the outputs of its layers, by name, in float32."""
    with captured_outputs(model_in(denoiser), layers) as captured:
        outputs = calls.call(denoiser, feeds)
    return outputs | {name: value.detach().float().numpy() for name, value in captured.items()}


def model_in(denoiser: Any) -> nn.Module:
    """The diffusers model in a denoiser: without the wrapper that looks up the step."""
    model: nn.Module = getattr(denoiser, "denoiser", denoiser)
    return model


def side_form(side: Side) -> Form:
    """The side as it is."""
    if side.in_torch:
        return Form(side, denoiser=side.module)
    return Form(side, engine=side.engine)


def structured(side: Side, other: Side) -> nn.Module:
    """The denoiser of a side in torch; a float model gets the structure of the low-bit one.

    Args:
        side: a side in torch.
        other: the other side.

    Raises:
        UsageError: the channels of the other side's attention are scaled, and its run is not at hand.
    """
    denoiser, row = side.module, other.row
    if not isinstance(side.opened, Checkpoint) or row is None:
        return denoiser
    denoiser = deepcopy(denoiser)
    structure = Structure(tuple(row.structure.attention), row.structure.splits)
    apply_structure(denoiser, structure)
    for product, tensors in _transforms(other).items():
        scale_channels(denoiser, product, tensors)
    return denoiser.eval()


def _transforms(side: Side) -> dict[str, TransformTensors]:
    """The factors of the channels of a side's attention, by path of the product."""
    if not any(layer.kind == "product" and layer.smooth for layer in side.layers):
        return {}
    low_bit = side.torch_denoiser()
    if low_bit is None:
        raise UsageError(
            f"the layers of {side.label} cannot be compared with a float model without its run, which "
            "holds the factors of attention's channels; give the run, or --against RUN"
        )
    return transforms_of(model_in(low_bit))


def marked_form(side: Side, other: Side, layers: Collection[str], folder: Path) -> Form:
    """A side with the outputs of its low-bit layers.

    Args:
        side: the side.
        other: the other side, whose structure a float model gets.
        layers: names of the layers.
        folder: an empty folder for a changed graph.

    Raises:
        UsageError: see `structured`.
    """
    if side.in_torch:
        denoiser = structured(side, other)
        present = dict(model_in(denoiser).named_modules())
        kept = tuple(name for name in layers if name in present)
        return Form(side, denoiser=denoiser, layers=kept)
    model = _prepared(side)
    mark_layers(model, layers)
    return Form(side, engine=_opened(model, folder, side), layers=tuple(layers))


def float_layers(denoiser: nn.Module, layers: Collection[str]) -> dict[str, nn.Module]:
    """The float forms of a denoiser's layers, by name."""
    modules = dict(model_in(denoiser).named_modules())
    return {name: float_form(modules[name]) for name in layers if name in modules}


def with_floats(form: Form, floats: Mapping[str, nn.Module], folder: Path) -> Form:
    """A side with some of its layers replaced by float layers.

    Args:
        form: the side as it is.
        floats: the float layers by name.
        folder: an empty folder for a changed graph.
    """
    if not floats:
        return form
    if form.denoiser is not None:
        denoiser = deepcopy(form.denoiser)
        for name, layer in floats.items():
            replace_module(model_in(denoiser), name, layer)
        return Form(form.side, denoiser=denoiser)
    model = _prepared(form.side)
    layers_to_float(model, floats)
    return Form(form.side, engine=_opened(model, folder, form.side))


def float_graph(
    side: Side, floats: Mapping[str, nn.Module], folder: Path
) -> tuple[Engine, dict[str, list[str]]]:
    """The graph of a side with layers in float, whose inputs are outputs of the graph, too.

    Args:
        side: a side with a graph.
        floats: the float layers by name.
        folder: an empty folder for the changed graph.

    Returns:
        The opened graph, and the outputs that hold the inputs of each layer.
    """
    model = _prepared(side)
    layers_to_float(model, floats)
    marked = mark_inputs(model, floats)
    return _opened(model, folder, side), marked


def _prepared(side: Side) -> Any:
    assert side.graph is not None, "engines are refused earlier, see `check_layered`"
    return prepare(load_graph(side.graph), "onnxruntime")


def _opened(model: Any, folder: Path, side: Side) -> Engine:
    """Write a changed graph and open it on the provider of a side."""
    folder.mkdir()
    save_rewritten(model, folder)
    return open_engine(folder / MODEL_FILE, side.provider)
