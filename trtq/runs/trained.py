"""`trained.safetensors`: the fine-tuned tensors, before they are merged into integer codes.

With it and the float checkpoint a run can be quantised again, e.g. with a LoRA in the weights, without
fine-tuning again. Keys are `<module path>:<tensor>`; a run that was not fine-tuned has no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtq.errors import ArtefactError
from trtq.quant.denoiser import QuantizedDenoiser
from trtq.quant.fake_quant import quantize_codes
from trtq.quant.formats import FormatTensors
from trtq.quant.modules import QuantLayer
from trtq.quant.plan import LowBitTensors, named_errors
from trtq.quant.tensors import LayerTensors, ProductTensors

__all__ = ["TRAINED_NAME", "restore_trained", "save_trained"]

TRAINED_NAME = "trained.safetensors"


@torch.no_grad()
def save_trained(path: Path, quantized: QuantizedDenoiser) -> None:
    """Write adapters, initial scales, tuned weights (as differences) and rounding directions."""
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized.layers():
        if layer.lora_A is not None and layer.lora_B is not None:
            tensors[f"{name}:lora_A"] = layer.lora_A.detach().clone()
            tensors[f"{name}:lora_B"] = layer.lora_B.detach().clone()
        if layer.base_scale is not None:
            tensors[f"{name}:base_scale"] = layer.base_scale
        if layer.tuned_weight is not None:
            tensors[f"{name}:tuned_weight"] = layer.tuned_weight - layer.weight
        if layer.tuned_bias is not None and layer.bias is not None:
            tensors[f"{name}:tuned_bias"] = layer.tuned_bias - layer.bias
        if layer.alpha is not None:
            tensors[f"{name}:rounded_up"] = (layer.alpha >= 0).to(torch.uint8)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)


@torch.no_grad()
def restore_trained(
    path: Path, quantized: QuantizedDenoiser, merged: Mapping[str, LowBitTensors]
) -> None:
    """Restore the fine-tuned tensors of a run in a freshly converted denoiser.

    Args:
        path: path of the run's file.
        quantized: denoiser converted with the run's plans and recipe; changed in place.
        merged: integers of the run's layers, which supply weight scales and activation tables.

    Raises:
        ArtefactError: the file is damaged, or belongs to another model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"cannot read {path}: {err}") from err
    for name, layer in quantized.layers():
        numbers = merged[name]
        assert not isinstance(numbers, ProductTensors)
        trained = {
            key.rpartition(":")[2]: value
            for key, value in tensors.items()
            if key.rpartition(":")[0] == name
        }
        try:
            with named_errors(name):
                _restore(layer, numbers, trained)
        except (RuntimeError, KeyError) as err:
            raise ArtefactError(f"{path} does not fit the layer {name!r}: {err}") from err
    operands = {
        f"{name}.{operand}": tables
        for name, layer in merged.items()
        for operand, tables in layer.operands.items()
    }
    for name, quantizer in quantized.activations():
        quantizer.set_range(operands[name].scale, -operands[name].low.float())


def _restore(
    layer: QuantLayer, numbers: LayerTensors | FormatTensors, trained: Mapping[str, Tensor]
) -> None:
    layer.weight_scale.copy_(numbers.weight.scale)
    layer.weight_zero_point.copy_(numbers.weight.zero_point)
    if layer.base_codes is not None and layer.base_scale is not None:
        # The base weight's codes were computed with the scale as it was before training.
        layer.base_scale.copy_(trained["base_scale"])
        scale, zero_point = layer.spread(layer.base_scale), layer.spread(layer.weight_zero_point)
        codes = quantize_codes(layer.weight, scale, zero_point, 0, layer.weight_qmax)
        layer.base_codes.copy_(codes.to(torch.uint8))
    if layer.lora_A is not None and layer.lora_B is not None:
        layer.lora_A.copy_(trained["lora_A"])
        layer.lora_B.copy_(trained["lora_B"])
    if "tuned_weight" in trained:
        layer.tune()
        assert layer.tuned_weight is not None
        layer.tuned_weight.add_(trained["tuned_weight"])
        if layer.tuned_bias is not None:
            layer.tuned_bias.add_(trained["tuned_bias"])
    if "rounded_up" in trained:
        layer.alpha = nn.Parameter(trained["rounded_up"].float() - 0.5, requires_grad=False)
