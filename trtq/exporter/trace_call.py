"""Tracing of one recorded call of a denoiser to an ONNX graph.

The inputs of the graph are the tensors of the call by path (`added_cond_kwargs.text_embeds`). Everything
else in the call, such as numbers and the structure, is constant. The outputs are the result's tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from trtq.errors import LegalityError
from trtq.exporter.complex_numbers import has_complex_numbers, real_module
from trtq.exporter.low_bit_nodes import replace_low_bit
from trtq.exporter.to_onnx import program_to_onnx, rename_axes
from trtq.exporter.trace import IR_VERSION, quiet, simplify
from trtq.graph.passes import BooleanWhere, CastIndicesToInt64

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CallTemplate", "TracedCall", "trace_call"]


class CallTemplate(Protocol):
    """The structure and the constants of a call."""

    def rebuild(self, tensors: Mapping[str, Tensor], /) -> dict[str, Any]:
        """The keyword arguments of the denoiser's forward, from the tensors by path."""
        ...


@dataclass(frozen=True)
class TracedCall:
    """The graph of one call.

    Attributes:
        model: the graph. Its inputs have the paths of the tensors, in order; its outputs are `output_0`,
            `output_1`, ...
        outputs: the structure of the denoiser's result, with the name of an output in place of each
            tensor.
        free: the axes of each input that any size fits, by path; a subset of the requested axes, since
            torch may fix an axis to its size in the example.
    """

    model: ir.Model
    outputs: Any
    free: dict[str, tuple[int, ...]]


@dataclass
class _Result:
    """The structure of a traced result, see `TracedCall.outputs`."""

    outputs: Any = None


class _Call(nn.Module):
    """Calls a denoiser with positional tensors and returns the tensors of its result."""

    def __init__(self, denoiser: nn.Module, form: CallTemplate, names: list[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.form = form
        self.names = names
        # torch.export restores the attributes of modules after tracing, but not those of other objects.
        self.result = _Result()
        self.bare = "return_dict" in inspect.signature(denoiser.forward).parameters

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = self.form.rebuild(dict(zip(self.names, tensors, strict=True)))
        if self.bare:
            arguments["return_dict"] = False
        result = self.denoiser(**arguments)
        if hasattr(result, "to_tuple"):
            result = result.to_tuple()
        leaves, structure = pytree.tree_flatten(result)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        count = itertools.count()
        names = [f"output_{next(count)}" if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.result.outputs = pytree.tree_unflatten(names, structure)
        return tuple(outputs)


def trace_call(
    denoiser: nn.Module,
    form: CallTemplate,
    tensors: Mapping[str, Tensor],
    low_bit: set[str],
    *,
    free: Mapping[str, Collection[int]] = MappingProxyType({}),
    half: bool = False,
    full_precision: Collection[str] = (),
) -> TracedCall:
    """Export a denoiser as one recorded call uses it; changes the denoiser in place.

    Args:
        denoiser: a float diffusers model.
        form: structure and constants of the call.
        tensors: tensors of the call by path; free axes have sizes of 2 or more.
        low_bit: module paths that become nodes of the domain `trtq`.
        free: indices of the axes whose size may vary, by path; every other axis is fixed.
        half: whether to compute in half precision.
        full_precision: paths of tensors that keep their type in half precision, e.g. the timestep.

    Returns:
        The graph, the structure of its outputs, and the axes that are free in it.

    Raises:
        LegalityError: torch cannot trace the denoiser; the message says why.
    """
    replace_low_bit(denoiser, low_bit)
    denoiser.eval()
    examples = dict(tensors)
    if half:
        denoiser.half()
        for name, value in examples.items():
            if value.dtype == torch.float32 and name not in full_precision:
                examples[name] = value.half()
    _register_constants(denoiser)
    caller = _Call(denoiser, form, list(examples)).eval()
    shapes = tuple(
        dict.fromkeys(sorted(free.get(name, ())), torch.export.Dim.AUTO) for name in examples
    )
    kind = type(denoiser).__name__
    with quiet(), torch.no_grad(), _free_sizes(denoiser):
        exported = _export(caller, tuple(examples.values()), shapes, kind)
        if has_complex_numbers(exported):
            exported = _export(real_module(exported), tuple(examples.values()), shapes, kind)
        model = _to_onnx(exported, list(examples), kind)
    _name_axes(model)
    input_shapes = {value.name: value.shape for value in model.graph.inputs}
    kept = {
        name: tuple(axis for axis in sorted(axes) if not isinstance(input_shapes[name][axis], int))  # type: ignore[index]
        for name, axes in free.items()
    }
    return TracedCall(model, caller.result.outputs, kept)


def _register_constants(denoiser: nn.Module) -> None:
    """Make buffers of tensors that are plain attributes, such as tables of rotary embeddings.

    A slice of a plain tensor would fix a free size to its value in the example.
    """
    for module in denoiser.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else len(value)


class _IntegerType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __call__(cls, *args: Any) -> Any:
        return args[0] if args and isinstance(args[0], torch.SymInt) else int(*args)


class _Integer(metaclass=_IntegerType):
    """Python's `int`, except that `int(size)` keeps a free size free."""


_FREE_SIZES = {"len": _length, "int": _Integer}


@contextlib.contextmanager
def _free_sizes(denoiser: nn.Module) -> Iterator[None]:
    """Inside the block, `len(tensor)` and `int(size)` in the code of a denoiser keep a free size free.

    Python's own functions return integers, which would fix the size.
    """
    files = {type(module).__module__ for module in denoiser.modules()}
    scopes = [vars(sys.modules[name]) for name in files if not name.startswith("torch.")]
    scopes = [scope for scope in scopes if not _FREE_SIZES.keys() & scope.keys()]
    for scope in scopes:
        scope.update(_FREE_SIZES)
    try:
        yield
    finally:
        for scope in scopes:
            for name in _FREE_SIZES:
                del scope[name]


def _export(
    caller: nn.Module, examples: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...], kind: str
) -> torch.export.ExportedProgram:
    # With `backed_size_oblivious`, torch keeps an axis free whose size in the example is 1, but cannot
    # always decide that two axes are equal; without it, torch reads this off the example.
    error: Exception | None = None
    for any_size in (True, False):
        oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=any_size)  # type: ignore[attr-defined]
        try:
            with oblivious:
                return torch.export.export(caller, examples, dynamic_shapes=(shapes,), strict=False)
        except LegalityError:
            raise
        except Exception as err:
            error = error or err
    assert error is not None
    raise LegalityError(f"torch cannot trace {kind}: {_reason(error)}") from error


def _to_onnx(program: torch.export.ExportedProgram, names: list[str], kind: str) -> ir.Model:
    count = len(program.graph_signature.user_outputs)
    try:
        model = program_to_onnx(program, names, [f"output_{index}" for index in range(count)])
        simplify(model)
    except Exception as err:
        # onnxscript cannot cut a free axis into parts, e.g. a batch in three.
        parts = "SplitToSequence" in str(err)
        reason = "the size of a tensor's parts depends on a free size" if parts else _reason(err)
        raise LegalityError(f"torch cannot write {kind} as a graph: {reason}") from err
    CastIndicesToInt64()(model)
    BooleanWhere()(model)
    model.ir_version = IR_VERSION
    return model


_DEPENDS_ON_VALUES = (
    "DataDependent",
    "data-dependent",
    "DynamicOutputShape",
    "unbacked",
    # A length that is read out of a tensor becomes a symbol, which Python cannot hash.
    "non-nested SymInt",
)


def _reason(err: BaseException) -> str:
    """The innermost cause of an error, and the line of the model that caused it, in one line."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    first = lines[0][:200] if lines else type(err).__name__
    if any(mark in f"{type(err).__name__}: {err}" for mark in _DEPENDS_ON_VALUES):
        first = "the length of a tensor depends on values of another, which a graph cannot hold"
    frames = [
        frame
        for frame in traceback.extract_tb(err.__traceback__)
        if "torch" not in Path(frame.filename).parts and Path(frame.filename).is_file()
    ]
    if not frames or Path(frames[-1].filename) == Path(__file__):
        return first
    place = frames[-1]
    return f"{first}; at `{(place.line or '')[:100]}`, {Path(place.filename).name}:{place.lineno}"


def _name_axes(model: ir.Model) -> None:
    """Name each symbol of a size after the first input and axis that has it."""
    graph = model.graph
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = None if isinstance(size, int) else size.value
            if symbol is not None and re.fullmatch(r"s\d+", symbol) and symbol not in names:
                names[symbol] = re.sub(r"\W", "_", f"{value.name}_{axis}")
    rename_axes(model, names)
