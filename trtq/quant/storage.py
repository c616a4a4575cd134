"""`quantized.safetensors`: a quantised denoiser as packed integers, tables and what stayed float.

Keys are `layer:<module path>:<tensor>` for quantised layers (see `LayerTensors.tensors`) and
`float:<parameter path>` for everything else. A float tensor that half precision holds exactly is
stored in half precision, so nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.errors import ArtefactError
from trtq.quant.convert import (
    LayerPlan,
    LowBitTensors,
    QuantizedDenoiser,
    deploy,
    named_errors,
    quantizable_layers,
)
from trtq.quant.deployed import LayerTensors, ProductTensors
from trtq.quant.modules import QuantLayer, QuantProduct
from trtq.quant.timestep import TimestepTable

__all__ = ["FILE_NAME", "StoredDenoiser", "load_stored", "save_denoiser", "stored_bytes"]

FILE_NAME = "quantized.safetensors"


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
    save_file(tensors, path)


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


def load_stored(path: Path, skeleton: nn.Module, plans: Sequence[LayerPlan]) -> StoredDenoiser:
    """Read `quantized.safetensors`.

    Args:
        path: the file.
        skeleton: a model of the denoiser's class, for the shapes of its layers.
        plans: bits of each layer, from the manifest.

    Raises:
        ArtefactError: the file is damaged or does not fit.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
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
    layers: dict[str, LowBitTensors] = {}
    for plan in plans:
        if plan.activation_bits is None:
            continue
        if plan.name not in grouped or plan.name not in sources:
            raise ArtefactError(f"{path} and its manifest disagree about the layer {plan.name!r}")
        named = grouped.pop(plan.name)
        with named_errors(plan.name):
            if plan.weight_bits is not None:
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
    if grouped:
        raise ArtefactError(
            f"{path} holds layers that its manifest does not: {sorted(grouped)[:3]}"
        )
    return StoredDenoiser(layers, floats)
