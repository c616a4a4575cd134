"""Complex numbers of an exported program as pairs of real tensors, since ONNX has no complex type.

1. A complex value becomes two real ones: `view_as_complex` takes both apart, `polar` is a cosine and a
   sine, `view_as_real` stacks them. A complex constant becomes two real constants.
2. A product is `(a c - b d, a d + b c)`, the order of operations of torch's own kernel.
3. An operator that only moves values applies to both parts.

Rotary embeddings are the only complex numbers in denoisers. The rewrite interprets the program, which is
then exported again, so sizes stay symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from trtq.errors import LegalityError

__all__ = ["has_complex_numbers", "real_module"]

_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


def has_complex_numbers(program: torch.export.ExportedProgram) -> bool:
    """Whether any value of a program is complex."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    values = (node.meta.get("val") for module in modules for node in module.graph.nodes)
    return any(_is_complex(leaf) for value in values for leaf in pytree.tree_leaves(value))


def real_module(program: torch.export.ExportedProgram) -> nn.Module:
    """A module that computes a program without complex numbers, see the module docstring.

    Args:
        program: the exported program; its inputs and outputs are real.

    Returns:
        A module for `torch.export.export`, with the inputs and outputs of the program.

    Raises:
        LegalityError: when the module is called, if an operator on complex numbers has no real form
            here; the message names the operator.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return _RealModule(module)


class _RealModule(nn.Module):
    """Runs a graph module with pairs in place of complex tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module
        for owner in module.modules():
            for name, value in [*vars(owner).items(), *owner._buffers.items()]:
                if _is_complex(value):
                    delattr(owner, name)
                    owner.register_buffer(f"{name}_real", value.real.detach().clone())
                    owner.register_buffer(f"{name}_imag", value.imag.detach().clone())

    def forward(self, *inputs: Tensor) -> Any:
        return _Interpreter(self.module).run(*inputs)


class _Pair:
    """A complex tensor as its real and its imaginary part."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real = real
        self.imag = imag


class _Interpreter(fx.Interpreter):
    """Runs a graph with a `_Pair` in place of each complex tensor."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        owner, _, name = str(target).rpartition(".")
        buffers = self.module.get_submodule(owner)._buffers
        if f"{name}_real" in buffers and name not in buffers:
            return _Pair(*(buffers[f"{name}_{part}"] for part in ("real", "imag")))  # type: ignore[arg-type]
        return super().get_attr(target, args, kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        if _is_complex(value):
            raise LegalityError(
                f"the input {target!r} is complex, and ONNX has no complex type; pass two real tensors"
            )
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        body = next((value for value in args if isinstance(value, fx.GraphModule)), None)
        if body is not None:
            # A block under autocast or without gradients, whose setting the graph does not need.
            return _Interpreter(body).run(*args[args.index(body) + 1 :])
        leaves = pytree.tree_leaves((args, kwargs))
        name = getattr(getattr(target, "_schema", None), "name", str(target)).removeprefix("aten::")
        complex_operands = name in _SOURCES or any(map(_involves_complex, leaves))
        if target is operator.getitem or not complex_operands:
            return super().call_function(target, args, kwargs)
        if name in _ARITHMETIC:
            return _ARITHMETIC[name](*args, **kwargs)
        if name in _IGNORED:
            return None
        if name in _SIZES:
            return target(args[0].real, *args[1:], **kwargs)
        if name in _CASTS:
            return _cast(target, args, kwargs)
        if name in _MOVES:
            return _move(target, args, kwargs)
        raise LegalityError(
            f"the operator {target} has complex operands, and ONNX has no complex numbers; trtq writes "
            "products, sums, polar and the operators that move values in real numbers only"
        )


def _is_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _involves_complex(value: Any) -> bool:
    return isinstance(value, _Pair | complex) or (isinstance(value, torch.dtype) and value in _REAL)


def _parts(value: Any) -> tuple[Any, Any]:
    """Real and imaginary part of an operand; the imaginary part of a real number is None."""
    if isinstance(value, _Pair | complex):
        return value.real, value.imag
    return value, None


def _product(left: Any, right: Any) -> _Pair:
    (a, b), (c, d) = _parts(left), _parts(right)
    if d is None:
        return _Pair(a * c, b * c)
    if b is None:
        return _Pair(a * c, a * d)
    return _Pair(a * c - b * d, a * d + b * c)


def _quotient(left: Any, right: Any) -> _Pair:
    (a, b), (c, d) = _parts(left), _parts(right)
    if d is not None:
        size = c * c + d * d
        a, b, c = a * c + b * d, b * c - a * d, size
    return _Pair(a / c, b / c)


def _sum(left: Any, right: Any, *, alpha: float = 1) -> _Pair:
    (a, b), (c, d) = _parts(left), _parts(right)
    if alpha != 1:
        c, d = c * alpha, None if d is None else d * alpha
    if b is None:
        return _Pair(a + c, torch.zeros_like(a) + d)
    return _Pair(a + c, b + (torch.zeros_like(a) if d is None else d))


def _difference(left: Any, right: Any, *, alpha: float = 1) -> _Pair:
    return _sum(left, right, alpha=-alpha)


def _polar(size: Tensor, angle: Tensor) -> _Pair:
    return _Pair(size * angle.cos(), size * angle.sin())


def _exp(value: _Pair) -> _Pair:
    return _polar(value.real.exp(), value.imag)


def _ones_like(value: _Pair, **_: Any) -> _Pair:
    return _Pair(torch.ones_like(value.real), torch.zeros_like(value.real))


_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "mul": _product,
    "div": _quotient,
    "add": _sum,
    "sub": _difference,
    "exp": _exp,
    "neg": lambda x: _Pair(-x.real, -x.imag),
    "conj": lambda x: _Pair(x.real, -x.imag),
    "_conj": lambda x: _Pair(x.real, -x.imag),
    "conj_physical": lambda x: _Pair(x.real, -x.imag),
    "resolve_conj": lambda x: x,
    "resolve_neg": lambda x: x,
    "real": lambda x: x.real,
    "imag": lambda x: x.imag,
    "polar": _polar,
    "complex": _Pair,
    "view_as_complex": lambda x: _Pair(x[..., 0], x[..., 1]),
    "view_as_real": lambda x: torch.stack([x.real, x.imag], -1),
    "ones_like": _ones_like,
}
_SOURCES = {"polar", "complex", "view_as_complex"}
"""Operators that make complex numbers of real ones."""
_IGNORED = {"_assert_tensor_metadata"}
_SIZES = {"sym_size", "sym_numel", "sym_stride", "size", "numel"}
_CASTS = {"to", "_to_copy", "type_as", "full", "zeros", "empty", "new_zeros", "new_full"}
_MOVES = {
    "alias", "cat", "chunk", "clone", "concat", "constant_pad_nd", "contiguous", "copy_", "detach",
    "expand", "expand_as", "flatten", "flip", "gather", "index", "index_put", "index_put_",
    "index_select", "lift_fresh", "lift_fresh_copy", "masked_fill", "movedim", "narrow", "pad",
    "pad_sequence", "permute", "repeat", "repeat_interleave", "reshape", "roll", "scatter", "select",
    "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros_like",
}  # fmt: skip


def _move(target: Any, args: Any, kwargs: Any) -> Any:
    """An operator that only moves values, applied to both parts."""

    def side(which: str) -> Any:
        moved = pytree.tree_map(
            lambda value: getattr(value, which) if isinstance(value, _Pair | complex) else value,
            (args, kwargs),
        )
        return target(*moved[0], **moved[1])

    real, imag = side("real"), side("imag")
    if isinstance(real, Tensor):
        return _Pair(real, imag)
    return type(real)(_Pair(*both) for both in zip(real, imag, strict=True))


def _cast(target: Any, args: Any, kwargs: Any) -> Any:
    """A conversion or a new tensor, of which operands or result are complex."""
    leaves = pytree.tree_leaves((args, kwargs))
    dtypes = [leaf for leaf in leaves if isinstance(leaf, torch.dtype)]
    args, kwargs = pytree.tree_map(
        lambda leaf: _REAL.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf,
        (args, kwargs),
    )
    pair = any(isinstance(leaf, _Pair) for leaf in leaves)
    if pair and (not dtypes or dtypes[0] in _REAL):
        return _move(target, args, kwargs)
    if pair:
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.real if isinstance(leaf, _Pair) else leaf, (args, kwargs)
        )
        return target(*args, **kwargs)
    real = target(*args, **kwargs)
    return _Pair(real, torch.zeros_like(real))
