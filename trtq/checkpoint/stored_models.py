"""Models whose large weights stay in their files, or in half precision, until a layer uses them.

The layers of a diffusers model read their weights from the checkpoint, see
`trtq.quant.stored_weight`. Text encoders of transformers, whose tensors may have other names in the
file, hold their weights in half precision, and a layer converts its own when it is called. Both compute
in float32 with the same numbers as a model that is loaded in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trtq.checkpoint.component_classes import is_component
from trtq.checkpoint.layout import read_index
from trtq.checkpoint.tensor_checks import check_finite_tensors
from trtq.checkpoint.weight_files import find_weights, has_weights
from trtq.checkpoint.weights import TensorInfo
from trtq.checkpoint.wording import one_line
from trtq.errors import ArtefactError
from trtq.quant.stored_weight import has_stored_weight, state_tensors, store_weight

__all__ = ["float_bytes", "half_dtype", "keep_half", "plain_state", "read_tensors", "stored_model"]

_LARGE = 1 << 18
"""Number of elements from which a weight stays in its file."""
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def float_bytes(folder: Path) -> int:
    """Size of all models of a pipeline's folder in float32, in bytes, from the files' headers.

    Args:
        folder: folder of the pipeline.

    Raises:
        ArtefactError: the index or a header cannot be read.
    """
    total = 0
    for part, entry in read_index(folder).items():
        if is_component(part, entry) and has_weights(folder / part):
            tensors = find_weights(folder / part).tensors.values()
            total += 4 * sum(math.prod(tensor.shape) for tensor in tensors)
    return total


def stored_model(
    place: Path, config: dict[str, Any], cls: Any, tensors: Mapping[str, TensorInfo]
) -> nn.Module | None:
    """A diffusers model in evaluation mode whose layers read large weights from the files.

    Args:
        place: folder of the model, used in messages.
        config: configuration of the model.
        cls: class of the model.
        tensors: header entries by name.

    Returns:
        The model; None: the files name the tensors otherwise than the model does.

    Raises:
        ArtefactError: a file cannot be read.
        NonFiniteError: a tensor that is read now holds NaN or infinity.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model: nn.Module = cls.from_config(dict(config))
    if set(model.state_dict()) != set(tensors):
        return None
    modules = dict(model.named_modules())
    small = {}
    for name, info in tensors.items():
        path, _, leaf = name.rpartition(".")
        layer = modules[path]
        if leaf == "weight" and isinstance(layer, _LAYERS) and math.prod(info.shape) >= _LARGE:
            store_weight(layer, info.file, name, info.shape)
        else:
            small[name] = info
    read = read_tensors(small)
    check_finite_tensors(read.items(), str(place))
    model.load_state_dict(read, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def half_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype that holds all tensors of a file exactly: half precision, or float32.

    Args:
        tensors: header entries by name.
    """
    dtypes = {info.dtype for info in tensors.values()} - {"I64", "I32", "BOOL"}
    half = len(dtypes) == 1 and dtypes <= _HALVES.keys()
    return _HALVES[dtypes.pop()] if half else torch.float32


def read_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Tensors from safetensors files as float32, by name.

    Args:
        tensors: header entries by name.

    Raises:
        ArtefactError: a file cannot be read.
    """
    from safetensors import safe_open

    read: dict[str, torch.Tensor] = {}
    for file in sorted({info.file for info in tensors.values()}):
        try:
            with safe_open(file, framework="pt") as reader:
                for name, info in tensors.items():
                    if info.file == file:
                        read[name] = reader.get_tensor(name).float()
        # safetensors raises an exception class of its own.
        except Exception as err:
            raise ArtefactError(f"cannot read {file}: {one_line(err)}") from err
    return read


class _Float32(nn.Module):
    """Converts a weight to float32."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


def keep_half(model: nn.Module) -> None:
    """Let the layers of a model convert large weights in half precision when they are called.

    Args:
        model: model, changed in place; everything else is converted to float32.
    """
    large: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.numel() >= _LARGE
        and module.weight.dtype in _HALVES.values()
    ]
    for module in large:
        parametrize.register_parametrization(module, "weight", _Float32(), unsafe=True)
    kept = {id(module.parametrizations.weight.original) for module in large}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.float()


@contextmanager
def plain_state(component: Any) -> Iterator[None]:
    """Inside the block, a model's state dict holds the weights themselves, for a library that writes it.

    The state dict of a model with stored weights holds their placeholders. Weights that half precision
    holds exactly are in half precision, so they take the memory of the checkpoint's file.

    Args:
        component: a component of a pipeline; what has no stored weights does not change.
    """
    if not isinstance(component, nn.Module) or not any(map(has_stored_weight, component.modules())):
        yield
        return
    state = _halves_in(component)
    others = state_tensors(component, state)
    state |= {name: _half_if_exact(tensor) for name, tensor in others}
    model: Any = component
    model.state_dict = lambda *_, **__: state
    try:
        yield
    finally:
        del model.state_dict


def _halves_in(model: nn.Module) -> dict[str, Tensor]:
    """The weights that layers hold in half precision and only convert, without copies, by name."""
    halves = {}
    for path, module in model.named_modules():
        if has_stored_weight(module):
            parts: Any = module.parametrizations["weight"]
            if len(parts) == 1 and isinstance(parts[0], _Float32):
                halves[f"{path}.weight"] = parts.original
    return halves


def _half_if_exact(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32:
        for dtype in _HALVES.values():
            half = tensor.to(dtype)
            if torch.equal(half.float(), tensor):
                return half
    return tensor.contiguous()
