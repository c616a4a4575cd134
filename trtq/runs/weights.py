"""`quantized.safetensors`: a quantised denoiser as packed integers, tables and float tensors.

Keys are `layer:<module path>:<tensor>` for quantised layers (see `LayerTensors.tensors`) and
`float:<parameter path>` for everything else. A float tensor that half precision holds exactly is
stored in half precision, so nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Unpack

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.documents import explain_first, parse_json, shown
from trtq.errors import ArtefactError, NonFiniteError
from trtq.precision import precision_text
from trtq.quant.convert import DeployOptions, deploy
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.formats import stored_tensors
from trtq.quant.modules import QuantLayer
from trtq.quant.plan import (
    LayerPlan,
    LowBitTensors,
    named_errors,
    quantizable_layers,
)
from trtq.quant.product import QuantProduct
from trtq.quant.stored_weight import plain_name, state_tensors
from trtq.quant.tensors import LayerTensors, ProductTensors
from trtq.quant.timestep import TimestepTable
from trtq.runs.weight_checks import (
    check_plans,
    check_shared,
    check_tables,
    check_transform,
    check_weight,
)

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
    """Convert a tensor to half precision if the conversion is exact."""
    tensor = tensor.detach()
    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    half = tensor.half()
    return (half if torch.equal(half.float(), tensor) else tensor).contiguous()


def stored_bytes(tensor: Tensor) -> int:
    """Size of a float tensor in the file, in bytes."""
    return _compact(tensor).nbytes


def save_denoiser(
    path: Path, quantized: QuantizedDenoiser, merged: Mapping[str, LowBitTensors]
) -> None:
    """Write a converted denoiser.

    Args:
        path: path of the file.
        quantized: the converted denoiser, before its `QuantLayer`s are replaced.
        merged: integers of the layers, from `merge`.
    """
    inside = {
        plain_name(f"{name}.{leaf}")
        for name, module in quantized.denoiser.named_modules()
        if isinstance(module, QuantLayer | QuantProduct)
        for leaf in module.state_dict()
    }
    tensors = {
        f"float:{name}": _compact(tensor)
        for name, tensor in state_tensors(quantized.denoiser, inside)
    }
    for name, layer in merged.items():
        for leaf, tensor in layer.tensors().items():
            tensors[f"layer:{name}:{leaf}"] = _compact(tensor) if leaf == "bias" else tensor
    save_file(tensors, path, _described(quantized, merged))


def _described(quantized: QuantizedDenoiser, merged: Mapping[str, LowBitTensors]) -> dict[str, str]:
    """Metadata of the file, which the manifest repeats: timesteps, and bits by sorted layer name."""
    description = {
        "timesteps": quantized.table.timesteps.tolist(),
        "bits": [_precision(merged[name]) for name in sorted(merged)],
    }
    # One key only: safetensors writes several keys in any order, and equal runs must give equal files.
    return {_DESCRIBED_KEY: json.dumps(description)}


def _precision(layer: LowBitTensors) -> str:
    if isinstance(layer, ProductTensors):
        text, policy = precision_text(None, layer.left.bits, layer.right.bits), layer.left.policy
    elif isinstance(layer, LayerTensors):
        text = precision_text(layer.weight.bits, layer.activation.bits)
        policy = layer.activation.policy
    else:
        return layer.precision
    return text if policy == "step" else f"{text} {policy}"


def described_bytes(steps: int, layers: int) -> int:
    """Maximum size of the file's metadata, in bytes."""
    return 25 * steps + 15 * layers + 100


class _Described(BaseModel):
    """The metadata that `_described` returns."""

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
        """Raise ArtefactError unless the manifest lists the timesteps of the calibrated tables."""
        if self.timesteps != torch.tensor(timesteps, dtype=torch.float32).tolist():
            raise ArtefactError(
                f"{path} was calibrated at the timesteps {shown(self.timesteps)}, but its "
                f"manifest lists {shown(list(timesteps))}; the manifest was edited"
            )

    def check_bits(self, path: Path, layers: Mapping[str, LowBitTensors]) -> None:
        """Raise ArtefactError unless every layer has the bits of the manifest.

        Tensor sizes do not always reveal the bits: a single 4-bit code takes a byte, like an 8-bit code.
        """
        names = sorted(layers)
        if len(self.bits) != len(names):
            raise ArtefactError(f"{path} is damaged: its metadata lists the bits of other layers")
        for name, bits in zip(names, self.bits, strict=True):
            if bits != _precision(layers[name]):
                raise ArtefactError(
                    f"{path} and its manifest disagree about the layer {name!r}: the manifest says "
                    f"{_precision(layers[name])}, the file {shown(bits)}"
                )


class StoredDenoiser:
    """The contents of a file of `save_denoiser`, in memory.

    Attributes:
        layers: the integers of the quantised layers.
        floats: every other tensor of the state dict, float32.
    """

    def __init__(self, layers: dict[str, LowBitTensors], floats: dict[str, Tensor]) -> None:
        self.layers = layers
        self.floats = floats

    def build(
        self, skeleton: nn.Module, table: TimestepTable, **options: Unpack[DeployOptions]
    ) -> QuantizedDenoiser:
        """The quantised denoiser, made from a freshly constructed float model of the same class.

        Args:
            skeleton: the float model; changed in place.
            table: the calibrated timesteps.
            **options: `kernels`, `timestep` and `per_item` of `trtq.quant.deploy`.

        Raises:
            ArtefactError: model and file have different layers.
        """
        self.load_floats(skeleton)
        return deploy(skeleton, self.layers, table, **options).eval()

    def load_floats(self, skeleton: nn.Module) -> None:
        """Assign the float tensors to a model, without copies; quantised layers do not change.

        Raises:
            ArtefactError: names or shapes of the tensors do not match the model.
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
    """Read `quantized.safetensors` and compare it with the manifest.

    Args:
        path: path of the file.
        skeleton: a model of the denoiser's class, for the kinds and shapes of its layers.
        plans: kind and bits of each layer, from the manifest.
        timesteps: the calibrated timesteps, cleanest first, from the manifest; None: not compared.

    Returns:
        The checked tensors.

    Raises:
        ArtefactError: the file is damaged, or does not match the manifest or the model; the message
            names the layer.
        NonFiniteError: a bias, or a tensor that stayed float, holds NaN or infinity.
    """
    described, by_layer, floats = _read(path)
    if described is not None and timesteps is not None:
        described.check_timesteps(path, timesteps)
    sources = quantizable_layers(skeleton)
    check_plans(path, plans, sources)
    layers: dict[str, LowBitTensors] = {}
    for plan in plans:
        if plan.activation_bits is None:
            continue
        if plan.name not in by_layer:
            raise ArtefactError(
                f"{path} and its manifest disagree about the layer {plan.name!r}: the file has no "
                "integers for this layer"
            )
        tensors = by_layer.pop(plan.name)
        with named_errors(plan.name):
            steps = None if timesteps is None else len(timesteps)
            layers[plan.name] = _layer(tensors, plan, sources[plan.name], steps)
    for name, tensor in floats.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{path}: the tensor {name!r} holds NaN or infinity")
    if by_layer:
        raise ArtefactError(
            f"{path} holds layers that its manifest does not: {sorted(by_layer)[:3]}"
        )
    if described is not None:
        described.check_bits(path, layers)
    for plan in plans:
        if plan.input_of is not None:
            check_shared(layers, plan.name, plan.input_of)
    return StoredDenoiser(layers, floats)


def _read(path: Path) -> tuple[_Described | None, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The file's description of itself, the tensors of each quantised layer, and all other tensors.

    The description is None for a run of an early version without one, whose tables alone are compared.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_DESCRIBED_KEY)
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    described = None if text is None else _Described.read(path, text)
    by_layer: dict[str, dict[str, Tensor]] = {}
    floats = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(":")
        if kind == "layer":
            name, _, leaf = rest.rpartition(":")
            by_layer.setdefault(name, {})[leaf] = tensor
        else:
            floats[rest] = tensor.float() if tensor.is_floating_point() else tensor
    return described, by_layer, floats


def _layer(
    tensors: Mapping[str, Tensor], plan: LayerPlan, source: Any, steps: int | None
) -> LowBitTensors:
    """The integers of one layer, checked against its plan and the model's layer."""
    assert plan.activation_bits is not None
    check_tables(tensors, plan, steps)
    if plan.format != "int":
        assert plan.weight_bits is not None
        check_transform(tensors, plan, source)
        return stored_tensors(tensors, plan.format, plan.weight_bits, plan.group, source)
    if plan.weight_bits is not None:
        check_weight(tensors, plan.weight_bits, source)
        check_transform(tensors, plan, source)
        return LayerTensors.from_tensors(
            tensors,
            channels=len(source.weight),
            weight_bits=plan.weight_bits,
            activation_bits=plan.activation_bits,
            policy=plan.scales,
        )
    if plan.right_bits is not None:
        check_transform(tensors, plan, None)
        return ProductTensors.from_tensors(
            tensors,
            left_bits=plan.activation_bits,
            right_bits=plan.right_bits,
            policy=plan.scales,
        )
    raise ArtefactError("the manifest gives bits that fit no kind of layer")
