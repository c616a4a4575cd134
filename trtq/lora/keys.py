"""Keys of tensors in LoRA files: layer and part of the update, and keys of other adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trtq.errors import ArtefactError

__all__ = ["SIDES", "check_tensor", "part_of", "unknown_keys"]

_ADAPTER_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
# Endings of keys, with the part of an update that they name.
_PARTS = tuple(
    (re.compile(rf"^(.+?){end}$"), part)
    for end, part in (
        (rf"\.lora_A{_ADAPTER_NAME}\.weight", "down"),
        (rf"\.lora_B{_ADAPTER_NAME}\.weight", "up"),
        (rf"\.lora_B{_ADAPTER_NAME}\.bias", "bias"),
        (rf"\.lora_magnitude_vector{_ADAPTER_NAME}(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "dora_scale"),
        (r"[._]lora_down\.weight", "down"),
        (r"[._]lora_up\.weight", "up"),
        (r"[._]lora_mid\.weight", "mid"),
        (r"(?:\.lora|\.lora_linear_layer)\.down\.weight", "down"),
        (r"(?:\.lora|\.lora_linear_layer)\.up\.weight", "up"),
        (r"\.alpha", "alpha"),
    )
)


# Keys of diffusers' old attention processors and of XLabs: `to_q_lora.down.weight`,
# `qkv_lora2.up.weight`.
_PROCESSOR = re.compile(r"^(.+)_lora(\d?)\.(down|up)\.weight$")
SIDES = {"down": "lora_A/lora_down", "up": "lora_B/lora_up"}
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ALPHA_TYPES = {*_FLOATS, "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
# Other adapters, by patterns of their keys.
_OTHERS = (
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.(oft_|boft_)", "OFT"),
    (r"oft_blocks|oft_diag", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.on_input$|ia3_l", "IA3"),
    (r"vera_lambda", "VeRA"),
    (r"lora_controlnet", "a Control-LoRA"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding"),
    (r"\.set_weight$", "set_weight (a replaced weight)"),
    (r"\.diff(_b)?$", "full differences of weights (diff, diff_b)"),
    (r"\.(w_norm|b_norm)$", "trained norms"),
    (r"modules_to_save", "modules_to_save (whole trained layers)"),
    (
        r"^(bundle_emb|string_to_param|emb_params|clip_[lg]$|t5xxl$)",
        "embeddings (textual inversion)",
    ),
)


def part_of(key: str) -> tuple[str, str] | None:
    """The name of the layer and the part of its update that a key names; None for other keys."""
    for pattern, part in _PARTS:
        if match := pattern.match(key):
            return match[1], part
    if match := _PROCESSOR.match(key):
        return match[1] + match[2], match[3]
    return None


def unknown_keys(path: Path, keys: list[str], known: int) -> ArtefactError:
    """The error for a file with keys that do not belong to a LoRA.

    Args:
        path: path of the file.
        keys: unknown keys.
        known: number of known keys in the file.
    """
    plain = "supported are LoRA and DoRA in the layouts of PEFT, diffusers, kohya and ComfyUI"
    for key in keys:
        for pattern, kind in _OTHERS:
            if re.search(pattern, key):
                return ArtefactError(f"{path} holds {kind} ({key!r}), which is not merged; {plain}")
    if known:
        return ArtefactError(
            f"{path} holds {len(keys)} tensors that are not part of a LoRA, e.g. {keys[0]!r}; {plain}"
        )
    text = "\n".join(keys)
    if re.search(r"^(encoder|decoder|first_stage_model)\.", text, re.MULTILINE):
        looks = "a VAE"
    elif re.search(
        r"^model\.diffusion_model\.|^cond_stage_model\.|^conditioner\.", text, re.MULTILINE
    ):
        looks = "a whole checkpoint"
    else:
        looks = "weights of a model"
    return ArtefactError(
        f"{path} is not a LoRA: none of its {len(keys)} tensors is part of a LoRA, e.g. {keys[0]!r}; it "
        f"looks like {looks}; {plain}"
    )


def check_tensor(path: Path, key: str, part: str, row: Mapping[str, Any]) -> None:
    """Raise unless a tensor can be the given part of an update, according to the file's header.

    Args:
        path: path of the file.
        key: key of the tensor.
        part: part of an update, see `part_of`.
        row: entry of the tensor in the header.

    Raises:
        ArtefactError: the dtype or the shape is not valid for the part.
    """
    kind, shape = row.get("dtype"), row.get("shape")
    if not isinstance(kind, str) or kind not in (_ALPHA_TYPES if part == "alpha" else _FLOATS):
        raise ArtefactError(
            f"{path}: {key!r} is of type {kind}; it must be float32, float16, bfloat16, float64 or "
            "float8 (e4m3fn, e5m2)"
        )
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtefactError(f"{path}: {key!r} has no shape; the file is damaged")
    count = 1
    for size in shape:
        count *= size
    if part == "alpha" and count != 1:
        raise ArtefactError(f"{path}: {key!r} has shape {shape}; an alpha is one number")
    if part in SIDES and len(shape) < 2:
        raise ArtefactError(
            f"{path}: {key!r} has shape {shape}; a matrix has at least two dimensions"
        )
    if count == 0:
        raise ArtefactError(
            f"{path}: {key!r} has shape {shape}: a LoRA of rank 0 or without channels changes nothing; "
            "the rank must be at least 1"
        )
