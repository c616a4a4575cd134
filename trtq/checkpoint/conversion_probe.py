"""Symbols in place of tensors: what a conversion of diffusers makes of which rows of which tensors.

A conversion of single-file checkpoints renames tensors, splits them along their first axis and joins
the pieces. Run on symbols, it tells which pieces of which tensors of the file each tensor of the model
is made of. No sizes are involved: several conversions have those of one released model written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trtq.checkpoint.quiet import quiet_diffusers

__all__ = ["ConversionError", "Piece", "Symbol", "run_conversion"]


class ConversionError(Exception):
    """A conversion does something that symbols do not express, or looks for a tensor that is missing."""


@dataclass(frozen=True)
class Piece:
    """One of the pieces that a tensor of the file is split into along its first axis.

    Attributes:
        name: name of the tensor in the file.
        index: index of the piece.
        count: number of pieces; 1: the whole tensor.
    """

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Symbol:
    """A tensor of which only its origin is known.

    Attributes:
        pieces: pieces that the tensor is joined from along its first axis.
        flattened: whether the conversion gives the tensor, a vector in the file, its axes.
    """

    pieces: tuple[Piece, ...]
    flattened: bool = False

    shape = (1, 1, 1, 1)
    """No conversion that can be inverted depends on a shape."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = func.__name__
        if name in ("chunk", "split", "reshape"):
            return getattr(args[0], name)(*args[1:], **options)
        if name == "cat":
            tensors, *rest = args
            dim = options.get("dim", rest[0] if rest else 0)
            if dim == 0 and not any(tensor.flattened for tensor in tensors):
                return cls(tuple(piece for tensor in tensors for piece in tensor.pieces))
        raise ConversionError(f"it calls torch.{name}")

    def size(self, dim: int) -> int:
        """As of a tensor, see `shape`."""
        return self.shape[dim]

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
        """As of a tensor; the pieces have equal sizes."""
        return self._parts(chunks, dim)

    def split(self, split_size: Iterable[int], dim: int = 0) -> tuple[Symbol, ...]:
        """As of a tensor; the sizes are those of the model's tensors, not those given."""
        if not isinstance(split_size, Iterable):
            raise ConversionError("it splits a tensor into pieces of one size")
        return self._parts(len(tuple(split_size)), dim)

    def reshape(self, *shape: Any) -> Symbol:
        """As of a tensor, which is a vector in the file."""
        if len(self.pieces) != 1 or self.pieces[0].count != 1:
            raise ConversionError("it reshapes a joined tensor")
        return Symbol(self.pieces, flattened=True)

    def _parts(self, count: int, dim: int) -> tuple[Symbol, ...]:
        whole = self.pieces[0]
        if dim != 0 or len(self.pieces) != 1 or whole.count != 1 or self.flattened:
            raise ConversionError("it splits a tensor twice, or along another axis than the first")
        return tuple(Symbol((Piece(whole.name, index, count),)) for index in range(count))

    def __getattr__(self, name: str) -> Any:
        raise ConversionError(f"it uses Tensor.{name}")

    def __getitem__(self, key: Any) -> Any:
        raise ConversionError("it indexes a tensor")


class _Checkpoint(dict[str, Any]):
    """The tensors of a file; a tensor that the conversion looks for by its name is created."""

    def __init__(self, names: Iterable[str], creates: bool, creates_optional: bool) -> None:
        super().__init__({name: Symbol((Piece(name),)) for name in names})
        self._creates, self._creates_optional = creates, creates_optional

    def pop(self, name: str, *default: Any) -> Any:
        if name in self:
            return super().pop(name)
        if default and not self._creates_optional:
            return default[0]
        return self.__missing__(name)

    def __missing__(self, name: str) -> Symbol:
        if not self._creates:
            raise ConversionError(f"it looks for {name!r}")
        return Symbol((Piece(name),))


def run_conversion(
    convert: Callable[..., Any],
    names: Collection[str],
    config: Mapping[str, Any],
    *,
    creates: bool = False,
    creates_optional: bool = False,
) -> dict[str, Symbol]:
    """The tensors of the model that a conversion gives, by name.

    Args:
        convert: a `checkpoint_mapping_fn` of diffusers.
        names: names of the file's tensors.
        config: configuration of the model.
        creates: whether tensors exist that the conversion requires by name and that are not in `names`.
        creates_optional: the same for tensors that the conversion takes if they exist.

    Raises:
        ConversionError: the conversion fails on symbols.
    """
    checkpoint = _Checkpoint(names, creates, creates_optional)
    try:
        with quiet_diffusers():
            converted = convert(checkpoint=checkpoint, config=dict(config))
    except ConversionError:
        raise
    # A conversion may raise any exception for names that are not those of its layout.
    except Exception as err:
        raise ConversionError(f"{type(err).__name__}: {err}") from err
    return {name: value for name, value in converted.items() if isinstance(value, Symbol)}
