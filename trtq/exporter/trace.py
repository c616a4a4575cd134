"""Tracing of a torch denoiser to an ONNX graph in which each low-bit layer is one node."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtq.diffusion.families import Family
from trtq.diffusion.sampling import Conditions
from trtq.errors import LegalityError
from trtq.exporter.low_bit_nodes import replace_low_bit
from trtq.exporter.to_onnx import OPSET, program_to_onnx, rename_axes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["IR_VERSION", "quiet", "simplify", "trace", "trace_module"]

IR_VERSION = 10
HEIGHT, WIDTH = "height", "width"


class _Denoiser(nn.Module):
    """Calls a denoiser with positional tensors and returns the bare prediction."""

    def __init__(self, denoiser: nn.Module, names: list[str], family: Family) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = names
        self.family = family

    def forward(self, *tensors: Tensor) -> Tensor:
        arguments = self.family.nest(dict(zip(self.names, tensors, strict=True)))
        prediction: Tensor = self.denoiser(**arguments, return_dict=False)[0]
        return prediction


class _Batched(nn.Module):
    """Calls a module with positional tensors; the inputs at the indices `batched` share a batch size."""

    def __init__(self, module: nn.Module, batched: list[int]) -> None:
        super().__init__()
        self.module = module
        self.batched = batched

    def forward(self, *tensors: Tensor) -> Any:
        for place in self.batched:
            # torch uses a separate symbol for the batch size of each input unless the code declares the
            # sizes equal.
            same = tensors[place].shape[0] == tensors[0].shape[0]
            torch._check(same)  # type: ignore[no-untyped-call]
        return self.module(*tensors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, suppress the messages of the exporter; its errors keep their texts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def trace(
    denoiser: nn.Module,
    x: Tensor,
    conditions: Conditions,
    low_bit: set[str],
    *,
    half: bool = False,
    cell: int | None = None,
) -> ir.Model:
    """Export a denoiser with a free batch size; changes the denoiser in place.

    Args:
        denoiser: a float diffusers model.
        x: small batch of noisy samples, `[B, ...]`, B > 1.
        conditions: conditions of the B images.
        low_bit: module paths that become nodes of the domain `trtq`.
        half: whether to compute in half precision; timesteps stay float32.
        cell: granularity of the samples' free height and width; None: both are fixed.

    Returns:
        The graph, with diffusers' inputs by flat name; the output is named after the family.

    Raises:
        LegalityError: torch cannot trace the denoiser, e.g. at a size that it does not support.
    """
    family = conditions.family
    replace_low_bit(denoiser, low_bit)
    examples = {family.sample: x, "timestep": torch.zeros(len(x))}
    examples |= conditions.conditional | conditions.shared
    if half:
        denoiser.half()
        for key, value in examples.items():
            if value.is_floating_point() and key != "timestep":
                examples[key] = value.half()
    caller = _Denoiser(denoiser, list(examples), family)
    try:
        return trace_module(
            caller,
            examples,
            [family.output],
            shared=set(conditions.shared),
            images={family.sample: cell},
        )
    except torch.onnx.OnnxExporterError as err:
        cause = str(err.__cause__ or err).strip().splitlines()
        raise LegalityError(
            f"torch cannot trace {type(denoiser).__name__} for samples of "
            f"{'x'.join(map(str, x.shape[1:]))}; does it take this size? {' '.join(cause[:2])}"
        ) from err


def trace_module(
    module: nn.Module,
    examples: Mapping[str, Tensor],
    outputs: list[str],
    *,
    shared: Collection[str] = (),
    axes: Mapping[int, str] = MappingProxyType({}),
    images: Mapping[str, int | None] = MappingProxyType({}),
) -> ir.Model:
    """Export a module with bare tensors as inputs and outputs, and with a free batch size.

    Args:
        module: module that is called with the examples in order and returns a tensor or a tuple.
        examples: example inputs by name, with B > 1.
        outputs: names of the outputs, in order.
        shared: names of inputs without a batch axis.
        axes: names of further free axes of all inputs, by index of the axis.
        images: granularity of the free H and W by name of an input `[B,C,H,W]`; None: both are fixed.

    Returns:
        The graph, with free axes and the given names of inputs and outputs.
    """
    # diffusers' upsampling branches on a batch of 64 or more. Without the bound torch detects the branch
    # at the end of the export and starts again. The graph itself accepts any batch size.
    free = {0: torch.export.Dim("batch", min=1, max=63)}
    free |= {axis: torch.export.Dim(name, min=1) for axis, name in axes.items()}
    shapes: dict[str, dict[int, Any]] = {}
    for name in examples:
        shapes[name] = {} if name in shared else dict(free)
        cell = images.get(name)
        if cell is not None:
            sides = {2: torch.export.Dim(HEIGHT, min=1), 3: torch.export.Dim(WIDTH, min=1)}
            shapes[name] |= {
                axis: cell * side if cell > 1 else side for axis, side in sides.items()
            }
    batched = [place for place, name in enumerate(examples) if name not in shared]
    with quiet(), torch.no_grad():
        model = _traced(
            _Batched(module, batched).eval(),
            tuple(examples.values()),
            tuple(shapes.values()),
            list(examples),
            outputs,
        )
    import onnx_ir as ir

    simplify(model)
    model.ir_version = IR_VERSION
    for value in model.graph.inputs:
        if images.get(value.name or "") is not None and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:2], HEIGHT, WIDTH])
    return model


def _traced(
    module: nn.Module,
    examples: tuple[Tensor, ...],
    shapes: tuple[dict[int, Any], ...],
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    """Export a module; the free axes have the names of their `Dim`, or of the one that is a factor."""
    try:
        # As `torch.onnx.export` does first.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = torch.export.export(
                module,
                examples,
                dynamic_shapes=(shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception:
        # `torch.onnx.export` knows other ways, and words the error if none works.
        exported = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(shapes,),
            optimize=False,
            verbose=False,
        )
        assert exported is not None
        model: ir.Model = exported.model
        return model
    model = program_to_onnx(program, inputs, outputs)
    names: dict[str, str] = {}
    for value, axes in zip(model.graph.inputs, shapes, strict=True):
        for axis, dim in axes.items():
            size = value.shape[axis] if value.shape is not None else None
            if size is not None and not isinstance(size, int) and size.value is not None:
                # A product of a size, e.g. `2 * height`, gets the name of that size.
                names.setdefault(size.value, getattr(dim, "root", dim).__name__)
    rename_axes(model, names)
    return model


def simplify(model: ir.Model) -> None:
    """Fold constants and remove operators without effect, in place.

    Only the rules of onnxscript's collection that match in denoisers are used. The whole collection
    produces the same graphs in ten times the time; at Stable Diffusion's size, one rule for slices takes
    the largest part.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    from trtq.graph.passes import DropNoopArithmetic

    passes.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    DropNoopArithmetic()(model)
    rewriter.rewrite(
        model,
        [
            rules.materialize_reshape_shape_rule,
            rules.reshape_reshape_rule,
            rules.transpose_transpose_rule,
            rules.no_op_transpose_rule,
            rules.no_op_expand_rule,
            rules.no_op_cast_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.squeeze_reshape_1d_rule,
        ],
    )
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
