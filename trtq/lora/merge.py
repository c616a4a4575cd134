"""Merge LoRAs into the float weights of a pipeline, either all or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.lora.base_model import base_model_of
from trtq.lora.names import Layer, Names, Site
from trtq.lora.read import Lora, LowRank, read_lora
from trtq.lora.request import LoraRequest
from trtq.lora.settings import strength
from trtq.quant.stored_weight import (
    change_weight,
    has_stored_weight,
    weight_parameter,
    weight_shape,
)

__all__ = ["MergedLora", "merge_loras"]


@dataclass(frozen=True)
class MergedLora:
    """A merged LoRA; one entry of a manifest's `loras`.

    Attributes:
        file: name of the file.
        sha256: hash of the file's content.
        scale: strength of the LoRA.
        modules: number of changed layers.
    """

    file: str
    sha256: str
    scale: float
    modules: int

    def as_dict(self) -> dict[str, Any]:
        """The entry in the manifest."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Change:
    """Change of one layer by one LoRA.

    Attributes:
        layer: layer with a weight `[N, K, ...]`.
        up: second matrix, `[N, R]`.
        down: first matrix, `[R, K, ...]`.
        mid: middle convolution of LoCon, `[R, R, kh, kw]`; None: there is none.
        scaling: factor of the product and of the bias.
        bias: values to add to the bias, `[N]`; None: no change.
        magnitude: DoRA's norms, `[N]`; None: not a DoRA.
    """

    layer: Layer
    up: Tensor
    down: Tensor
    mid: Tensor | None
    scaling: float
    bias: Tensor | None
    magnitude: Tensor | None

    def delta(self) -> Tensor:
        """The update, shaped like the weight."""
        shape = weight_shape(self.layer.module)
        if self.mid is None:
            product = self.up @ self.down.flatten(1)
        else:
            # LoCon: a 1 x 1 convolution, a convolution with the layer's kernel, a 1 x 1 convolution.
            inner = torch.einsum("ij...,jk->ik...", self.mid, self.down.flatten(1))
            product = torch.einsum("oi,i...->o...", self.up, inner)
        return product.reshape(shape) * self.scaling


def _fits(shape: Sequence[int], update: LowRank) -> bool:
    """Whether an update's matrices fit a weight `[N, K, ...]`, except for the output channels."""
    inputs, kernel = shape[1], tuple(shape[2:])
    points = all(size == 1 for size in kernel)
    if any(size != 1 for size in update.up.shape[2:]) or update.down.shape[1] != inputs:
        return False
    inner = tuple(update.down.shape[2:])
    if update.mid is not None:
        return all(size == 1 for size in inner) and tuple(update.mid.shape[2:]) == kernel
    # Linear layers and 1 x 1 convolutions are equivalent; files use either form.
    return inner == kernel or (points and all(size == 1 for size in inner))


def _halves_swapped(tensor: Tensor | None) -> Tensor | None:
    """Swap the halves, shift and scale, along the first dimension."""
    return None if tensor is None else torch.cat(tensor.chunk(2)[::-1])


def _changes(lora: Lora, name: str, site: Site, update: LowRank, scaling: float) -> list[_Change]:
    """The changes of all layers that one update applies to.

    Raises:
        ArtefactError: the update does not fit the layers.
    """
    shapes = [tuple(weight_shape(layer.module)) for layer in site.layers]
    rows = [shape[0] for shape in shapes]
    if sum(rows) != len(update.up) or not all(_fits(shape, update) for shape in shapes):
        weights = " + ".join(map(str, shapes))
        raise ArtefactError(
            f"the LoRA {lora.name} does not fit {name!r}: its matrices are {tuple(update.up.shape)} and "
            f"{tuple(update.down.shape)}, the weight is {weights}; the LoRA is for another model"
        )
    up, bias, magnitude = update.up.flatten(1), update.bias, update.magnitude
    if site.swapped:
        swapped = _halves_swapped(up)
        assert swapped is not None
        up, bias, magnitude = swapped, _halves_swapped(bias), _halves_swapped(magnitude)
    changes, first = [], 0
    for layer, count in zip(site.layers, rows, strict=True):
        part = slice(first, first + count)
        first += count
        if bias is not None and layer.module.bias is None:
            raise ArtefactError(
                f"the LoRA {lora.name} has a bias for {name!r}, but the layer has no bias; the LoRA is "
                "for another model"
            )
        changes.append(
            _Change(
                layer,
                up[part],
                update.down,
                update.mid,
                scaling,
                None if bias is None else bias[part],
                None if magnitude is None else magnitude[part],
            )
        )
    return changes


def _factor(lora: Lora, name: str, site: Site, names: Names, update: LowRank) -> float:
    """`alpha / rank` of one update, from its alpha, from PEFT's settings, or else 1.

    Raises:
        ArtefactError: the alpha in the file differs from the settings.
    """
    component, path = names.split(name)
    component = component or site.layers[0].component
    settings = lora.settings.get(component, lora.settings.get(""))
    by_alpha = None if update.alpha is None else strength(update.alpha, update.rank)
    if settings is None:
        return 1.0 if by_alpha is None else by_alpha
    paths = (*dict.fromkeys((site.layers[0].path, path)),)
    factor = settings.factor(paths, update.rank, update.magnitude is not None)
    if by_alpha is not None and by_alpha != factor:
        raise ArtefactError(
            f"the LoRA {lora.name} gives {name!r} two strengths: alpha / rank is {by_alpha:g} by its "
            f"alpha and {factor:g} by {settings.where}; remove one of them"
        )
    return factor


def _sites(lora: Lora, names: Names) -> dict[str, Site]:
    """The sites of a LoRA's updates, by name.

    Raises:
        ArtefactError: the model does not have a layer that the LoRA names.
    """
    sites, missing = names.find(lora.updates)
    if missing:
        outputs = {name: len(lora.updates[name].up) for name in missing}
        sites |= names.renamed_by_diffusers(outputs)
        missing = [name for name in missing if name not in sites]
    if missing:
        looks = base_model_of(
            lora.updates, {name: update.down.shape[1] for name, update in lora.updates.items()}
        )
        absent = sorted(
            {c for c, _ in map(names.split, missing) if c and c not in names.components}
        )
        raise ArtefactError(
            f"the LoRA {lora.name} is for another architecture: {len(missing)} of its "
            f"{len(lora.updates)} layers are not in this model, e.g. {missing[0]!r}"
            + (f" (this model has no {', '.join(absent)})" if absent else "")
            + (f"; it looks like a LoRA for {looks}" if looks else "")
            + f"; this model's {names.denoiser} is a {names.kind}: use a LoRA for this model"
        )
    return sites


def _matched(lora: Lora, names: Names, scale: float) -> list[_Change]:
    """The changes by a LoRA.

    Raises:
        ArtefactError: a layer is not in the model, has another shape, or is named twice.
    """
    owners: dict[int, str] = {}
    changes = []
    for name, site in _sites(lora, names).items():
        update = lora.updates[name]
        factor = _factor(lora, name, site, names, update)
        for change in _changes(lora, name, site, update, scale * factor):
            module = change.layer.module
            other = owners.setdefault(id(module), name)
            if other != name:
                raise ArtefactError(
                    f"the LoRA {lora.name} gives {change.layer.path!r} twice, as {other!r} and as "
                    f"{name!r}; a file holds one adapter"
                )
            parameter = weight_parameter(module)
            if not parameter.is_floating_point():
                raise ArtefactError(
                    f"{change.layer.path!r} holds {parameter.dtype}; LoRAs are merged into float "
                    "weights"
                )
            changes.append(change)
    return changes


_Changes = Sequence[tuple[Lora, _Change]]
"""All changes of one weight, and the LoRAs that they belong to."""


def _changed(changes: _Changes, original: Tensor) -> Tensor:
    """A weight after all of its changes, in its own dtype."""
    base = original.detach().float()
    weight = base
    for _, change in changes:
        delta = change.delta().to(base)
        weight = weight + delta
        if change.magnitude is not None:
            # DoRA (arXiv:2402.09353): the norm is taken of the original weight plus the update.
            norm = torch.linalg.vector_norm((base + delta).flatten(1), dim=1)
            factor = change.magnitude.to(base) / norm
            weight = factor.reshape(-1, *(1,) * (weight.ndim - 1)) * weight
    return weight.to(original.dtype)


def _changed_bias(changes: _Changes) -> Tensor | None:
    """A layer's bias after all of its changes; None: it has none."""
    original: Tensor | None = changes[0][1].layer.module.bias
    if original is None:
        return None
    bias = original.detach().float()
    for _, change in changes:
        if change.bias is not None:
            bias = bias + change.bias.to(bias) * change.scaling
    return bias.to(original.dtype)


def _check_finite(changes: _Changes) -> None:
    """Raise unless a layer's weight and bias are finite after all of its changes.

    Raises:
        NonFiniteError: a value is too large for the weight's dtype.
    """
    results = _changed(changes, changes[0][1].layer.module.weight), _changed_bias(changes)
    if not all(bool(torch.isfinite(t).all()) for t in results if t is not None):
        names = " and ".join(dict.fromkeys(lora.name for lora, _ in changes))
        raise NonFiniteError(
            f"the LoRA {names} makes {changes[0][1].layer.path!r} NaN or infinite; give it a "
            "smaller scale"
        )


@torch.no_grad()
def merge_loras(
    components: Mapping[str, nn.Module], requests: Sequence[LoraRequest], denoiser: str = "unet"
) -> list[MergedLora]:
    """Add LoRAs to float weights, in place; no weight changes unless all LoRAs fit.

    The weights equal those of diffusers' `load_lora_weights` and `fuse_lora`, computed in float32.

    Args:
        components: float models by name in the pipeline, e.g. `unet`, `text_encoder`.
        requests: files and strengths of the LoRAs.
        denoiser: name of the component that files without component names apply to.

    Raises:
        UsageError: a LoRA is given twice, or a strength is not a finite number.
        ArtefactError: a file cannot be read, or is for another model.
        NonFiniteError: a file holds NaN or infinity, or makes weights infinite.
    """
    if not requests:
        return []
    for request in requests:
        if not math.isfinite(request.scale):
            raise UsageError(
                f"the scale of {request.path} is {request.scale}; give a finite number"
            )
    loras = [read_lora(request.path) for request in requests]
    seen: set[str] = set()
    for lora in loras:
        if lora.sha256 in seen:
            raise UsageError(
                f"the LoRA {lora.name} is given twice; give it once, with the sum of scales"
            )
        seen.add(lora.sha256)
    names = Names(components, denoiser)
    merged = []
    # The updates of two layers that share a weight are added.
    by_weight: dict[int, list[tuple[Lora, _Change]]] = {}
    for request, lora in zip(requests, loras, strict=True):
        changes = _matched(lora, names, request.scale)
        for change in changes:
            key = id(weight_parameter(change.layer.module))
            by_weight.setdefault(key, []).append((lora, change))
        merged.append(MergedLora(lora.name, lora.sha256, request.scale, len(changes)))
    # Results are computed twice, first for checking all of them: keeping them would need as much memory
    # as the model.
    for group in by_weight.values():
        _check_finite(group)
    for group in by_weight.values():
        module = group[0][1].layer.module
        if has_stored_weight(module):
            change_weight(module, partial(_changed, group))
        else:
            module.weight.copy_(_changed(group, module.weight))
        bias = _changed_bias(group)
        if bias is not None:
            module.bias.copy_(bias)
    return merged
