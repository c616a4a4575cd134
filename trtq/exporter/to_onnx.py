"""Translation of an exported torch program to an ONNX graph, without the parts of it that take longest.

`torch.onnx.export` decomposes a program before it translates it: it traces the program twice more, which
takes more than half of its time. The denoisers and autoencoders of diffusers consist almost only of
operators that have an ONNX function already. If the few others can be replaced one by one, as `_replace`
does, there is nothing to decompose, and the program is translated as it is. Any other program is
decomposed by torch.

Then torch computes the whole program once more, to find out which operands need a cast, although the
trace knows the type and shape of every value; `_known_values` spares this.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OPSET", "program_to_onnx", "rename_axes"]

OPSET = 21

_aten = torch.ops.aten

_ASSERTIONS = {
    _aten._assert_async.msg,
    _aten._assert_scalar.default,
    _aten._assert_tensor_metadata.default,
    _aten.sym_constrain_range_for_size.default,
}
_CASTS = {_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other}
_RENAMED = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.max.other: _aten.maximum.default,
    _aten.min.other: _aten.minimum.default,
}
_OUT_OF_PLACE = {
    _aten.add_.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor,
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.div_.Tensor: _aten.div.Tensor,
}
_NEW_MEMORY = {
    _aten.add.Tensor,
    _aten.bmm.default,
    _aten.conv2d.default,
    _aten.div.Tensor,
    _aten.linear.default,
    _aten.matmul.default,
    _aten.mul.Tensor,
    _aten.sub.Tensor,
}
"""Operators whose result is never a view of an operand."""


def program_to_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Translate an exported program; changes the program in place.

    Args:
        program: the exported program.
        inputs: names of the graph's inputs, in order.
        outputs: names of the graph's outputs, in order.

    Returns:
        The graph, without optimisations.

    Raises:
        torch.onnx.OnnxExporterError: an operator has no ONNX function.
    """
    registry = _registry()
    if registry is not None and _is_plain(program, registry):
        _replace(program.graph_module)
        # Nothing is left to decompose.
        program.run_decompositions = lambda *_, **__: program
    with _one_registry(registry), _known_values():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    model: ir.Model = exported.model
    return model


def rename_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Rename free sizes in the shapes of all values, in place.

    Args:
        model: the graph.
        names: new name of each size, by torch's symbol, e.g. `s26`, or by a product with it, `2*s26`.
    """
    import onnx_ir as ir

    by_length = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, by_length))})(?!\w)")

    def size_of(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim | str:
        if isinstance(size, int) or size.value is None:
            return size
        # torch writes a size that it has fixed as a symbol of digits.
        if size.value.isdigit():
            return int(size.value)
        return pattern.sub(lambda match: names[match[0]], size.value) if names else size

    graph = model.graph
    values = [*graph.inputs, *graph.outputs]
    values += [output for node in graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([size_of(size) for size in value.shape])


@functools.cache
def _registry() -> Any:
    """Torch's table of ONNX functions, which takes half a second to make; None if torch has moved it."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        registry = ONNXRegistry.from_torchlib(opset_version=OPSET)
        registry.is_registered(_aten.add.Tensor)
    except (ImportError, AttributeError, TypeError):
        return None
    return registry


@contextlib.contextmanager
def _one_registry(registry: Any) -> Iterator[None]:
    """Inside the block, torch uses this table in place of a new one for each export."""
    if registry is None:
        yield
        return
    kind = type(registry)
    original = vars(kind)["from_torchlib"]
    kind.from_torchlib = classmethod(lambda *_, **__: registry)
    try:
        yield
    finally:
        kind.from_torchlib = original


@contextlib.contextmanager
def _known_values() -> Iterator[None]:
    """Inside the block, torch's pass that inserts casts takes the values from the trace.

    The pass asks for types only, and a cast that it inserts leaves the type of the result as it was. If
    torch has moved what this needs, torch computes the values.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        kind: Any = type_promotion._TypePromotionInterpreter
        original, rule_of = vars(kind)["run_node"], type_promotion.get_type_promotion_rule
        inside, promote = kind._set_current_node, kind._maybe_promote_node
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def run_node(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return original(self, node)
        with inside(self, node):
            rule = rule_of(node, self.type_promotion_table)
            if rule is not None:
                promote(self, node, rule)
        return node.meta["val"]

    kind.run_node = run_node
    try:
        yield
    finally:
        kind.run_node = original


def _is_plain(program: torch.export.ExportedProgram, registry: Any) -> bool:
    """Whether every operator has an ONNX function, or a replacement in `_replace`."""
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    nested = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if len(nested) > 1:
        return False
    for node in program.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function" or not _has_function(node, registry):
            return False
    return True


def _has_function(node: fx.Node, registry: Any) -> bool:
    target = node.target
    if target in _ASSERTIONS or target in _RENAMED:
        return True
    if target in _CASTS:
        return _on_cpu(node)
    if target in _OUT_OF_PLACE:
        return _overwrites_only_its_operand(node)
    if isinstance(target, OpOverload) and target._schema.is_mutable:
        return False
    return bool(registry.is_registered(target))


def _on_cpu(node: fx.Node) -> bool:
    """Whether a cast stays on the processor."""
    value, operand = node.meta.get("val"), _operand(node).meta.get("val")
    return (
        isinstance(value, Tensor)
        and isinstance(operand, Tensor)
        and value.device == operand.device == torch.device("cpu")
        and value.layout == operand.layout
    )


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _overwrites_only_its_operand(node: fx.Node) -> bool:
    """Whether the same operator out of place gives the same values everywhere.

    It does if the memory of the first operand is new, and nothing else reads it.
    """
    operand, other = node.args[:2]
    if not isinstance(operand, fx.Node) or not isinstance(other, fx.Node):
        return False
    metas = [operand.meta.get("val"), other.meta.get("val"), node.meta.get("val")]
    values = [value for value in metas if isinstance(value, Tensor)]
    if len(values) < len(metas):
        return False
    # Out of place, the type and the shape of the result could be larger than those of the operand.
    same = len({value.dtype for value in values}) == 1 and values[0].shape == values[2].shape
    return same and operand.target in _NEW_MEMORY and list(operand.users) == [node]


def _replace(module: fx.GraphModule) -> None:
    """Replace the operators without an ONNX function, in place.

    1. Assertions are dropped, as torch does after it has decomposed a program.
    2. A cast becomes `_to_copy`, or nothing if the type stays.
    3. An operator in place becomes the same operator out of place.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _CASTS:
            operand, dtype = _operand(node), node.meta["val"].dtype
            if operand.meta["val"].dtype == dtype:
                node.replace_all_uses_with(operand)
                graph.erase_node(node)
            else:
                node.target = _aten._to_copy.default
                node.args, node.kwargs = (operand,), {"dtype": dtype}
        elif node.target in _RENAMED:
            node.target = _RENAMED[node.target]
        elif node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
    graph.eliminate_dead_code()
    module.recompile()
