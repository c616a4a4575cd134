"""LoRA files, in the layouts of diffusers/PEFT and of kohya, from safetensors only.

    diffusers/PEFT   unet.down_blocks.0.….to_q.lora_A.weight, …lora_B.weight
                     older: ….lora.down.weight, ….lora.up.weight
                     or     ….processor.to_q_lora.down.weight
    kohya            lora_unet_down_blocks_0_…_to_q.lora_down.weight, …lora_up.weight, ….alpha

An update is `scale * alpha / rank * up @ down`; without an `alpha` it is `scale * up @ down`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtq.errors import ArtefactError, NonFiniteError, UsageError

__all__ = ["Lora", "LoraRequest", "LowRank", "parse_lora", "read_lora"]

_DOWN = re.compile(r"^(.+?)[._](?:lora_A(?:\.default)?|lora_down|lora\.down)\.weight$")
_UP = re.compile(r"^(.+?)[._](?:lora_B(?:\.default)?|lora_up|lora\.up)\.weight$")
_PROCESSOR = re.compile(r"^(.+)\.processor\.(to_[qkv]|to_out)$")
_ADAPTER_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA as it was asked for.

    Attributes:
        path: the file.
        scale: its strength.
    """

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:SCALE]` -> a `LoraRequest`.

    Raises:
        UsageError: the scale is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or (
        len(path) == 1 and not Path(text).is_file() and number.startswith(("\\", "/"))
    ):
        return LoraRequest(Path(text))
    if Path(text).is_file():
        return LoraRequest(Path(text))
    try:
        scale = float(number)
    except ValueError:
        scale = float("nan")
    if scale != scale or abs(scale) == float("inf"):
        raise UsageError(f"--lora {text!r}: the scale {number!r} is not a number; write FILE:0.8")
    return LoraRequest(Path(path), scale)


@dataclass(frozen=True, eq=False)
class LowRank:
    """One update; `down[R, K, ...]`, `up[N, R, ...]`, `factor` is `alpha / R`."""

    down: Tensor
    up: Tensor
    factor: float

    def delta(self, shape: torch.Size) -> Tensor:
        """The update, shaped like the weight `[N, K, ...]`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.factor * product.reshape(shape)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file.

    Attributes:
        name: the file's.
        sha256: of its content.
        updates: by target as the file names it: `unet.mid_block…` or, in kohya's layout,
            `lora_unet_mid_block_…`.
    """

    name: str
    sha256: str
    updates: dict[str, LowRank]


def _target(prefix: str) -> str:
    """The module that a key's front part means."""
    prefix = prefix.removeprefix("base_model.model.")
    match = _PROCESSOR.match(prefix)
    if match is None:
        return prefix
    # Older files name the processor's own layers.
    return f"{match[1]}.{'to_out.0' if match[2] == 'to_out' else match[2]}"


def _adapter_alpha(metadata: dict[str, str]) -> dict[str, float]:
    """`lora_alpha` of each component, from what diffusers writes into the file's metadata."""
    try:
        found = json.loads(metadata.get(_ADAPTER_METADATA, "{}"))
    except ValueError:
        return {}
    return {
        key.removesuffix(".lora_alpha"): float(value)
        for key, value in found.items()
        if key.endswith(".lora_alpha") and isinstance(value, int | float)
    }


def read_lora(path: Path) -> Lora:
    """Read a LoRA.

    Raises:
        ArtefactError: it cannot be read, is not safetensors, or holds what is no plain LoRA.
        NonFiniteError: it holds NaN or infinity.
    """
    if not path.is_file():
        raise ArtefactError(f"there is no LoRA file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise ArtefactError(
            f"{path} is not a safetensors file ({err}); LoRAs are read from safetensors only, since a "
            "pickle can run any code"
        ) from err
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    alpha: dict[str, float] = {}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise NonFiniteError(f"{path}: {key!r} holds NaN or infinity")
        if match := _DOWN.match(key):
            down[_target(match[1])] = tensor
        elif match := _UP.match(key):
            up[_target(match[1])] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alpha[_target(key.removesuffix(".alpha"))] = float(tensor)
        else:
            raise ArtefactError(
                f"{path} holds {key!r}, which is not part of a plain LoRA; what is read are pairs of "
                "low-rank matrices in the layouts of diffusers, PEFT and kohya (no LoHa, LoKr or DoRA)"
            )
    if not down or down.keys() != up.keys():
        odd = sorted(down.keys() ^ up.keys())
        what = f"{odd[0]!r} has only one of its two matrices" if odd else "it holds no matrices"
        raise ArtefactError(f"{path} is not a LoRA: {what}")
    common = _adapter_alpha(metadata)
    updates = {}
    for name, matrix in down.items():
        rank = len(matrix)
        if up[name].ndim < 2 or matrix.ndim < 2 or up[name].shape[1] != rank:
            raise ArtefactError(
                f"{path}: the matrices of {name!r} do not fit each other: {tuple(up[name].shape)} and "
                f"{tuple(matrix.shape)}"
            )
        strength = alpha.get(name, common.get(name.partition(".")[0], float(rank)))
        updates[name] = LowRank(matrix, up[name], strength / rank)
    return Lora(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), updates)
