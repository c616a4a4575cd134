"""Base class of modules whose quantised layers are trained: a whole denoiser, or a block of one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trtq.quant.activation import ActivationQuantizer
from trtq.quant.modules import QuantLayer
from trtq.quant.product import QuantProduct

__all__ = ["QuantizedPart"]


class QuantizedPart(nn.Module):
    """A module `denoiser` with quantised layers, whose paths begin with `place`.

    Attributes:
        denoiser: the whole denoiser, or a part of it.
        place: path of `denoiser` in the whole denoiser; empty for the whole.
    """

    denoiser: nn.Module
    place: str = ""

    def _paths(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules by their path in the whole denoiser."""
        for name, module in self.denoiser.named_modules():
            yield ".".join(part for part in (self.place, name) if part), module

    def layers(self) -> Iterator[tuple[str, QuantLayer]]:
        """The quantised linears and convolutions by their path in the whole denoiser."""
        for name, module in self._paths():
            if isinstance(module, QuantLayer):
                yield name, module

    def products(self) -> Iterator[tuple[str, QuantProduct]]:
        """The quantised products by their path in the whole denoiser."""
        for name, module in self._paths():
            if isinstance(module, QuantProduct):
                yield name, module

    def activations(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        """The activation quantisers by path in the whole denoiser; if shared, by the first path."""
        for name, module in self._paths():
            if isinstance(module, ActivationQuantizer):
                yield name, module
