"""`quantized.safetensors`: a quantised denoiser as packed integers, tables and what stayed float.

Keys are `layer:<module path>:<tensor>` for quantised layers (see `LayerTensors.tensors`) and
`float:<parameter path>` for everything else. A float tensor that half precision holds exactly is
stored in half precision, so nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.documents import explain_first, parse_json, shown
from trtq.errors import ArtefactError, NonFiniteError
from trtq.quant.convert import deploy
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.modules import QuantLayer
from trtq.quant.packing import PackedWeight, unpack_codes
from trtq.quant.plan import (
    LayerPlan,
    LowBitTensors,
    layer_kind,
    named_errors,
    precision_text,
    quantizable_layers,
)
from trtq.quant.product import QuantProduct
from trtq.quant.tensors import LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable

__all__ = [
    "FILE_NAME",
    "StoredDenoiser",
    "described_bytes",
    "load_stored",
    "save_denoiser",
    "stored_bytes",
]

FILE_NAME = "quantized.safetensors"
_DESCRIBED_KEY = "trtq"


def _compact(tensor: Tensor) -> Tensor:
    """Half precision where that loses nothing."""
    tensor = tensor.detach()
    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    half = tensor.half()
    return (half if torch.equal(half.float(), tensor) else tensor).contiguous()


def stored_bytes(tensor: Tensor) -> int:
    """What a float tensor takes in the file."""
    return _compact(tensor).nbytes


def save_denoiser(
    path: Path, quantized: QuantizedDenoiser, merged: Mapping[str, LowBitTensors]
) -> None:
    """Write a converted denoiser.

    Args:
        path: the file.
        quantized: it, with its `QuantLayer`s still inside.
        merged: the integers of its layers, from `merge`.
    """
    inside = {
        f"{name}.{leaf}"
        for name, module in quantized.denoiser.named_modules()
        if isinstance(module, QuantLayer | QuantProduct)
        for leaf in module.state_dict()
    }
    tensors = {
        f"float:{name}": _compact(tensor)
        for name, tensor in quantized.denoiser.state_dict().items()
        if name not in inside
    }
    for name, layer in merged.items():
        for leaf, tensor in layer.tensors().items():
            tensors[f"layer:{name}:{leaf}"] = _compact(tensor) if leaf == "bias" else tensor
    save_file(tensors, path, _described(quantized, merged))


def _described(quantized: QuantizedDenoiser, merged: Mapping[str, LowBitTensors]) -> dict[str, str]:
    """The file's own word for what its manifest says too: timesteps, and bits by sorted name."""
    own = {
        "timesteps": quantized.table.timesteps.tolist(),
        "bits": [_precision(merged[name]) for name in sorted(merged)],
    }
    # One key: safetensors writes several in any order, and the same run is to be the same file.
    return {_DESCRIBED_KEY: json.dumps(own)}


def _precision(layer: LowBitTensors) -> str:
    if isinstance(layer, ProductTensors):
        return precision_text(None, layer.left.bits, layer.right.bits)
    return precision_text(layer.weight.bits, layer.activation.bits)


def described_bytes(steps: int, layers: int) -> int:
    """What the file's own word takes of it, at most."""
    return 25 * steps + 8 * layers + 100


class _Described(BaseModel):
    """What `_described` wrote."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    timesteps: list[Annotated[float, Field(strict=True, allow_inf_nan=False)]]
    bits: list[str]

    @classmethod
    def read(cls, path: Path, text: str) -> _Described:
        try:
            return cls.model_validate(parse_json(text))
        except ValidationError as err:
            raise ArtefactError(f"{path} is damaged: its metadata: {explain_first(err)}") from err
        except ValueError as err:
            raise ArtefactError(f"{path} is damaged: its metadata: {err}") from err

    def check_timesteps(self, path: Path, timesteps: Sequence[float]) -> None:
        """Nothing, if the manifest lists the timesteps that the tables were made at."""
        if self.timesteps != torch.tensor(timesteps, dtype=torch.float32).tolist():
            raise ArtefactError(
                f"{path} was calibrated at the timesteps {shown(self.timesteps)}, its manifest says "
                f"{shown(list(timesteps))}; the manifest was edited"
            )

    def check_bits(self, path: Path, layers: Mapping[str, LowBitTensors]) -> None:
        """What few channels do not show: one code of 4 bits takes a byte, like one of 8."""
        names = sorted(layers)
        if len(self.bits) != len(names):
            raise ArtefactError(f"{path} is damaged: its metadata tell the bits of other layers")
        for name, bits in zip(names, self.bits, strict=True):
            if bits != _precision(layers[name]):
                raise ArtefactError(
                    f"{path} and its manifest disagree about the layer {name!r}: the manifest says "
                    f"{_precision(layers[name])}, the file {shown(bits)}"
                )


class StoredDenoiser:
    """What `save_denoiser` wrote, in memory.

    Attributes:
        layers: the integers of the quantised layers.
        floats: every other tensor of the state dict, float32.
    """

    def __init__(self, layers: dict[str, LowBitTensors], floats: dict[str, Tensor]) -> None:
        self.layers = layers
        self.floats = floats

    def build(
        self, skeleton: nn.Module, table: TimestepTable, *, kernels: bool = False
    ) -> QuantizedDenoiser:
        """Put the tensors into a freshly constructed float model of the same class.

        Args:
            skeleton: the model.
            table: the calibrated timesteps.
            kernels: run its layers by our kernels, see `trtq.quant.deploy`.

        Raises:
            ArtefactError: the model has other layers than the file.
        """
        self.load_floats(skeleton)
        return deploy(skeleton, self.layers, table, kernels=kernels).eval()

    def load_floats(self, skeleton: nn.Module) -> None:
        """Give the model its float tensors, not copies of them; quantised layers stay as they are.

        Raises:
            ArtefactError: names or shapes do not fit.
        """
        try:
            missing, unexpected = skeleton.load_state_dict(self.floats, strict=False, assign=True)
        except RuntimeError as err:
            raise ArtefactError(f"the tensors do not fit the denoiser: {err}") from err
        expected = {f"{name}.{leaf}" for name in self.layers for leaf in ("weight", "bias")}
        if unexpected or set(missing) - expected:
            raise ArtefactError(
                "the tensors do not fit the denoiser: missing "
                f"{sorted(set(missing) - expected)[:3]}, unexpected {sorted(unexpected)[:3]}"
            )


def load_stored(
    path: Path,
    skeleton: nn.Module,
    plans: Sequence[LayerPlan],
    timesteps: Sequence[float] | None = None,
) -> StoredDenoiser:
    """Read `quantized.safetensors`, and hold what the manifest says against it.

    Args:
        path: the file.
        skeleton: a model of the denoiser's class, for the kinds and shapes of its layers.
        plans: kind and bits of each layer, from the manifest.
        timesteps: the calibrated ones, cleanest first, from the manifest; None: they are not compared.

    Raises:
        ArtefactError: the file is damaged, or the manifest or the model does not fit it; the message
            names the layer.
        NonFiniteError: a bias, or a tensor that stayed float, holds NaN or infinity.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_DESCRIBED_KEY)
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    # A run made before the file said so itself is held against its tables alone.
    described = None if text is None else _Described.read(path, text)
    if described is not None and timesteps is not None:
        described.check_timesteps(path, timesteps)
    grouped: dict[str, dict[str, Tensor]] = {}
    floats = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(":")
        if kind == "layer":
            name, _, leaf = rest.rpartition(":")
            grouped.setdefault(name, {})[leaf] = tensor
        else:
            floats[rest] = tensor.float() if tensor.is_floating_point() else tensor
    sources = quantizable_layers(skeleton)
    _check_plans(path, plans, sources)
    layers: dict[str, LowBitTensors] = {}
    for plan in plans:
        if plan.activation_bits is None:
            continue
        if plan.name not in grouped:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the file has no "
                "integers of it"
            )
        named = grouped.pop(plan.name)
        with named_errors(plan.name):
            _check_tables(named, plan, None if timesteps is None else len(timesteps))
            if plan.weight_bits is not None:
                _check_weight(named, plan.weight_bits, sources[plan.name])
                layers[plan.name] = LayerTensors.from_tensors(
                    named,
                    channels=len(sources[plan.name].weight),
                    weight_bits=plan.weight_bits,
                    activation_bits=plan.activation_bits,
                )
            elif plan.right_bits is not None:
                layers[plan.name] = ProductTensors.from_tensors(
                    named, left_bits=plan.activation_bits, right_bits=plan.right_bits
                )
            else:
                raise ArtefactError("the manifest gives bits that fit no kind of layer")
    for name, tensor in floats.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{path}: the tensor {name!r} holds NaN or infinity")
    if grouped:
        raise ArtefactError(
            f"{path} holds layers that its manifest does not: {sorted(grouped)[:3]}"
        )
    if described is not None:
        described.check_bits(path, layers)
    for plan in plans:
        if plan.input_of is not None:
            _check_shared(layers, plan.name, plan.input_of)
    return StoredDenoiser(layers, floats)


def _check_plans(path: Path, plans: Sequence[LayerPlan], sources: Mapping[str, nn.Module]) -> None:
    """Every layer of the model is in the manifest, under its kind, and no other."""
    for plan in plans:
        source = sources.get(plan.name)
        if source is None:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the denoiser has none "
                "of that name"
            )
        if layer_kind(source) != plan.kind:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the manifest says "
                f"{plan.kind!r}, in the denoiser it is {layer_kind(source)!r}"
            )
    missing = set(sources) - {plan.name for plan in plans}
    if missing:
        raise ArtefactError(f"the manifest beside {path} has no row for the layer {min(missing)!r}")


def _check_tables(named: Mapping[str, Tensor], plan: LayerPlan, steps: int | None) -> None:
    """The tables of every quantised input: one entry per timestep, and codes of the manifest's bits."""
    for operand, bits in plan.operands.items():
        kinds = {"scale": torch.float32, "inv_scale": torch.float32}
        kinds |= {"low": torch.int16, "high": torch.int16}
        tables = {leaf: _tensor(named, f"{operand}.{leaf}", kind) for leaf, kind in kinds.items()}
        entries = tables["scale"].numel() if steps is None else steps
        for leaf, table in tables.items():
            if table.shape != (entries,):
                raise ArtefactError(
                    f"the table {operand}.{leaf} has shape {tuple(table.shape)}, though the manifest "
                    f"lists {entries} timesteps"
                )
        scale, low, high = tables["scale"], tables["low"].int(), tables["high"].int()
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise ArtefactError(f"the table {operand}.scale must hold positive finite numbers")
        if not torch.allclose(tables["inv_scale"], scale.reciprocal(), rtol=1e-5, atol=0):
            raise ArtefactError(f"the table {operand}.inv_scale is not the reciprocal of the scale")
        if bool(((low > 0) | (high < 0) | (low < -128) | (high > 127)).any()):
            raise ArtefactError(f"the codes of {operand} do not lie round zero within int8")
        if bool((high - low != 2**bits - 1).any()):
            raise ArtefactError(
                f"the manifest says {bits} bits for {operand}, its codes span "
                f"{int((high - low).min()) + 1} .. {int((high - low).max()) + 1} values"
            )


def _check_weight(named: Mapping[str, Tensor], bits: int, source: Any) -> None:
    """Codes, scales, zero points and bias of one layer, against the layer of the model."""
    channels, *rest = source.weight.shape
    codes = _tensor(named, "weight.codes", torch.uint8)
    packed = (-(-channels * bits // 8), *rest)
    if codes.shape != packed:
        raise ArtefactError(
            f"the manifest says {bits} bits, for which the packed weight has shape {packed}; got "
            f"{tuple(codes.shape)}"
        )
    one_each = (channels, *(1,) * len(rest))
    scale = _tensor(named, "weight.scale", torch.float32)
    zero_point = _tensor(named, "weight.zero_point", torch.int16)
    if scale.shape != one_each or zero_point.shape != one_each:
        raise ArtefactError(
            f"the weight's scale and zero point have shape {one_each}, got {tuple(scale.shape)} and "
            f"{tuple(zero_point.shape)}"
        )
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ArtefactError("the weight's scale must hold positive finite numbers")
    # With 0 .. 128 subtracted, codes of any width fit int8; those of others are looked at.
    if bool(((zero_point < 2**bits - 128) | (zero_point > 128)).any()):
        PackedWeight(
            unpack_codes(codes, bits, channels), scale, zero_point.float(), bits
        ).integers()
    bias = named.get("bias")
    if (bias is None) != (source.bias is None) or (bias is not None and bias.shape != (channels,)):
        found = "none" if bias is None else f"one of shape {tuple(bias.shape)}"
        needed = "none" if source.bias is None else f"one of shape {(channels,)}"
        raise ArtefactError(f"the denoiser's layer has {needed} as bias, the file {found}")
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise NonFiniteError("the bias holds NaN or infinity")


def _tensor(named: Mapping[str, Tensor], leaf: str, dtype: torch.dtype) -> Tensor:
    if leaf not in named:
        raise ArtefactError(f"the tensor {leaf!r} is missing")
    if named[leaf].dtype != dtype:
        raise ArtefactError(f"the tensor {leaf!r} is of {named[leaf].dtype}, needed is {dtype}")
    return named[leaf]


def _check_shared(layers: Mapping[str, LowBitTensors], name: str, owner: str) -> None:
    """Layers that share a quantiser have the same tables."""
    own, shared = layers[name].operands, layers[owner].operands
    if own.keys() != shared.keys() or not all(
        torch.equal(getattr(one, leaf), getattr(shared[operand], leaf))
        for operand, one in own.items()
        for leaf in ("scale", "low", "high")
    ):
        raise ArtefactError(
            f"layer {name!r}: the manifest says that it has the input of {owner!r}, but their tables "
            "differ"
        )
