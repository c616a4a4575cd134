"""From diffusers' names back to those of a model's authors: the inverse of the single-file conversion.

diffusers knows one direction only. The other one is found and then proven: diffusers' own conversion,
run on symbols, has to turn the names found into exactly the model's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trtq.checkpoint.conversion_probe import ConversionError, Piece, Symbol, run_conversion
from trtq.checkpoint.renames import renamed_original
from trtq.checkpoint.unet_names import unet_original

__all__ = ["OriginalTensor", "Source", "original_tensors"]

_AMBIGUOUS = (
    "HunyuanVideoTransformer3DModel",
    "WanAnimateTransformer3DModel",
    "WanAnimate2Transformer3DModel",
)
"""Classes whose conversion accepts other names than those that their authors use."""


@dataclass(frozen=True)
class Source:
    """Rows of a tensor of the model.

    Attributes:
        name: name of the tensor in diffusers.
        index: index of the equal parts that the tensor's rows are divided into.
        count: number of these parts; 1: all rows.
    """

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original layout, made of rows of the model's tensors.

    Attributes:
        sources: rows that are joined along the first axis.
        flattened: whether the tensor is a vector in the original layout.
    """

    sources: tuple[Source, ...]
    flattened: bool = False


def original_tensors(
    model_class: str, config: Mapping[str, Any], names: Collection[str]
) -> dict[str, OriginalTensor]:
    """The tensors of a model in the layout of its authors, by name.

    Args:
        model_class: name of the model's class in diffusers, e.g. `FluxTransformer2DModel`.
        config: configuration of the model.
        names: names of all its tensors in diffusers.

    Raises:
        ConversionError: diffusers has no conversion for the class, or it cannot be inverted.
    """
    from diffusers.loaders import single_file_model

    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(model_class)
    if entry is None:
        raise ConversionError("diffusers has no table of the original names")
    if model_class in _AMBIGUOUS:
        raise ConversionError("diffusers' table of the original names fits several names")
    convert = entry["checkpoint_mapping_fn"]
    problems: list[str] = []
    for find in (_by_structure, _by_renaming, _by_asking):
        try:
            converted = find(model_class, convert, config, names)
            return _inverse(converted, names)
        except ConversionError as err:
            problems.append(str(err))
    raise ConversionError(f"diffusers' table of the original names has no inverse ({problems[-1]})")


def _by_structure(
    model_class: str,
    convert: Callable[..., Any],
    config: Mapping[str, Any],
    names: Collection[str],
) -> dict[str, Symbol]:
    if model_class != "UNet2DConditionModel":
        raise ConversionError("it is no UNet of latent-diffusion")
    return run_conversion(convert, [unet_original(name, config) for name in names], config)


def _by_renaming(
    model_class: str,
    convert: Callable[..., Any],
    config: Mapping[str, Any],
    names: Collection[str],
) -> dict[str, Symbol]:
    if model_class == "UNet2DConditionModel":
        raise ConversionError("it is a UNet of another structure than latent-diffusion's")
    known: dict[str, list[int]] = {}
    originals = {renamed_original(convert, name, config, known): None for name in names}
    return run_conversion(convert, list(originals), config)


def _by_asking(
    model_class: str,
    convert: Callable[..., Any],
    config: Mapping[str, Any],
    names: Collection[str],
) -> dict[str, Symbol]:
    """Names that the conversion itself asks for, once it knows the number of layers."""
    hints = _hints(model_class, config)
    failure = ConversionError("")
    for optional in (False, True):
        try:
            converted = run_conversion(
                convert, hints, config, creates=True, creates_optional=optional
            )
        except ConversionError as err:
            failure = err
            continue
        if converted.keys() >= set(names):
            return {name: converted[name] for name in converted if name in names}
        failure = ConversionError(f"it gives no {min(set(names) - converted.keys())!r}")
    raise failure


def _hints(model_class: str, config: Mapping[str, Any]) -> list[str]:
    """Names from which a conversion tells the number of layers and the optional parts."""
    last = {key: int(config.get(key) or 0) - 1 for key in ("num_layers", "num_single_layers")}
    if model_class in ("FluxTransformer2DModel", "ChromaTransformer2DModel"):
        hints = [
            f"double_blocks.{last['num_layers']}.",
            f"single_blocks.{last['num_single_layers']}.",
        ]
        if config.get("guidance_embeds"):
            hints.append("guidance_in.")
        if "approximator_layers" in config:
            guidance = int(config["approximator_layers"]) - 1
            hints.append(f"distilled_guidance_layer.layers.{guidance}.")
        return hints
    if model_class == "SD3Transformer2DModel":
        hints = [f"joint_blocks.{last['num_layers']}."]
        if config.get("qk_norm"):
            hints.append("ln_q.")
        dual = config.get("dual_attention_layers") or ()
        return hints + [f"joint_blocks.{layer}.attn2." for layer in dual]
    if model_class == "AuraFlowTransformer2DModel":
        counts = {
            "double_layers": config["num_mmdit_layers"],
            "single_layers": config["num_single_dit_layers"],
        }
        return [f"{part}.{index}." for part, count in counts.items() for index in range(count)]
    return []


def _inverse(converted: Mapping[str, Symbol], names: Collection[str]) -> dict[str, OriginalTensor]:
    """The tensors of the file, given the pieces of it that each tensor of the model is made of.

    Raises:
        ConversionError: the conversion gives other tensors than the model's, or leaves out a piece.
    """
    if converted.keys() != set(names):
        different = sorted(converted.keys() ^ set(names))
        raise ConversionError(f"it does not give the model's tensors: {different[0]!r}")
    rows: dict[Piece, Source] = {}
    flattened: set[str] = set()
    for name, symbol in converted.items():
        for index, piece in enumerate(symbol.pieces):
            if piece in rows:
                raise ConversionError(f"{piece.name!r} is used twice")
            rows[piece] = Source(name, index, len(symbol.pieces))
        if symbol.flattened:
            flattened.add(symbol.pieces[0].name)
    originals: dict[str, OriginalTensor] = {}
    for first in rows:
        if first.name in originals:
            continue
        pieces = [Piece(first.name, index, first.count) for index in range(first.count)]
        if any(piece not in rows for piece in pieces):
            raise ConversionError(f"a part of {first.name!r} is not used")
        sources = tuple(rows[piece] for piece in pieces)
        originals[first.name] = OriginalTensor(sources, first.name in flattened)
    if sum(len(tensor.sources) for tensor in originals.values()) != len(rows):
        raise ConversionError("a tensor is split in two ways")
    return originals
