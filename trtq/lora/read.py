"""Read LoRA files of all layouts, from safetensors only.

    PEFT             base_model.model.….to_q.lora_A.weight, …lora_B.weight and adapter_config.json
    diffusers        unet.down_blocks.0.….to_q.lora_A.weight, …lora_B.weight, settings in the metadata
                     older: ….lora.down.weight, ….lora.up.weight, ….lora_linear_layer.down.weight
                     or     ….processor.to_q_lora.down.weight
    kohya            lora_unet_down_blocks_0_…_to_q.lora_down.weight, …lora_up.weight, ….alpha
    ComfyUI          diffusion_model.….lora_A.weight or lora_down.weight

An update is `scale * alpha / rank * up @ down`; without an `alpha` it is `scale * up @ down`.
`trtq.lora.names` finds the layers of the names, and `trtq.lora.settings` interprets PEFT's settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtq.documents import MAX_BYTES
from trtq.errors import ArtefactError, NonFiniteError
from trtq.lora.file import check_regular, locate, read_header
from trtq.lora.keys import SIDES, check_tensor, part_of, unknown_keys
from trtq.lora.settings import Settings, parse_json, read_settings

__all__ = ["Lora", "LowRank", "read_lora"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one layer in a file; all tensors in float32.

    Attributes:
        down: first matrix, `[R, K, ...]`.
        up: second matrix, `[N, R, ...]`.
        mid: middle convolution of LoCon, `[R, R, kh, kw]`; None: there is none.
        alpha: value of `alpha` in the file; None: the file has none.
        bias: values to add to the layer's bias (`lora_bias`), `[N]`; None: no change.
        magnitude: DoRA's norm of each output channel, `[N]`; None: not a DoRA.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    alpha: float | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank R."""
        return len(self.down)


@dataclass(frozen=True, eq=False)
class Lora:
    """Content of a LoRA file.

    Attributes:
        name: name of the file, preceded by the folder's name if a folder was given.
        sha256: hash of the file, including the `adapter_config.json` that determines its strength.
        updates: updates by the layer's name in the file.
        settings: PEFT's settings by component; the key `""` applies to all components.
    """

    name: str
    sha256: str
    updates: dict[str, LowRank]
    settings: dict[str, Settings] = field(default_factory=dict)


def _loaded(path: Path, keys: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
    """Tensors in float32, by layer and part.

    Raises:
        ArtefactError: the file is damaged, or names a layer twice.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key, (name, part) in keys.items():
                tensor = file.get_tensor(key).to(torch.float32)
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(
                        f"{path}: {key!r} holds NaN or infinity; the LoRA is damaged"
                    )
                if part in tensors.setdefault(name, {}):
                    raise ArtefactError(
                        f"{path} gives {name!r} twice (again as {key!r}); a file holds one adapter"
                    )
                tensors[name][part] = tensor
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"{path} is not a safetensors file, or is cut short ({err})") from err
    return tensors


def _update(path: Path, name: str, parts: Mapping[str, Tensor]) -> LowRank:
    """One layer's update from its tensors.

    Raises:
        ArtefactError: a part is missing, or the shapes of the parts are inconsistent.
    """
    for side, words in SIDES.items():
        if side not in parts:
            raise ArtefactError(
                f"{path} is not a whole LoRA: {name!r} has only {', '.join(sorted(parts))}; its "
                f"{words} matrix is missing"
            )
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank = len(down)
    fits = up.shape[1] == rank and (mid is None or mid.shape[:2] == (rank, rank))
    if mid is not None and mid.ndim < 3:
        fits = False
    if not fits:
        shapes = " and ".join(str(tuple(t.shape)) for t in (up, down, mid) if t is not None)
        raise ArtefactError(
            f"{path}: the matrices of {name!r} do not fit each other: {shapes}; the second size of "
            "lora_B (up) must equal the first size of lora_A (down), the rank"
        )
    if "magnitude" in parts and "dora_scale" in parts:
        raise ArtefactError(
            f"{path} gives DoRA's magnitude of {name!r} twice; a file holds one adapter"
        )
    for part in ("bias", "magnitude", "dora_scale"):
        # PEFT and kohya store norms of output channels (PEFT as `[1, N, 1, 1]` for a convolution),
        # LyCORIS possibly norms of input channels, `[1, K]`.
        if part in parts and (
            parts[part].numel() != len(up) or (part == "dora_scale" and len(parts[part]) != len(up))
        ):
            kind = "the bias" if part == "bias" else "DoRA's magnitude"
            raise ArtefactError(
                f"{path}: {kind} of {name!r} has shape {tuple(parts[part].shape)}; it must have one "
                f"number for each of its {len(up)} output channels"
            )
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    bias, magnitude = parts.get("bias"), parts.get("magnitude", parts.get("dora_scale"))
    return LowRank(
        down,
        up,
        mid,
        alpha,
        None if bias is None else bias.flatten(),
        None if magnitude is None else magnitude.flatten(),
    )


def _settings(path: Path, metadata: Any, names: Iterable[str]) -> tuple[dict[str, Settings], bytes]:
    """PEFT's settings of a file, and the bytes of `adapter_config.json` if they come from there.

    Raises:
        ArtefactError: the settings are damaged or not supported.
    """
    config = path.parent / "adapter_config.json"
    # The configuration applies to PEFT's file; the folder may also contain other LoRAs.
    if path.name == "adapter_model.safetensors" or any(n.startswith("base_model.") for n in names):
        if config.exists():
            text = _config_text(config)
            return {"": read_settings(parse_json(text, str(config)), str(config))}, text
        if path.name == "adapter_model.safetensors":
            raise ArtefactError(
                f"{path} is a PEFT adapter, whose strength is in adapter_config.json; that file is "
                "missing in its folder"
            )
    note = metadata.get("lora_adapter_metadata") if isinstance(metadata, dict) else None
    if note is None:
        return {}, b""
    where = f"the metadata of {path} (lora_adapter_metadata)"
    if not isinstance(note, str):
        raise ArtefactError(f"{where} is {type(note).__name__}, not text")
    components: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(note, where).items():
        component, dot, setting = key.partition(".")
        components.setdefault(component if dot else "", {})[setting if dot else component] = value
    return {name: read_settings(values, where) for name, values in components.items()}, b""


def _config_text(config: Path) -> bytes:
    """The content of `adapter_config.json`.

    Raises:
        ArtefactError: the file cannot be read or is too large.
    """
    check_regular(config, "adapter_config.json")
    try:
        if (size := config.stat().st_size) > MAX_BYTES:
            raise ArtefactError(f"{config} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return config.read_bytes()
    except OSError as err:
        raise ArtefactError(f"{config} cannot be read ({err.strerror or err})") from err


def read_lora(path: Path) -> Lora:
    """Read a LoRA.

    Args:
        path: safetensors file, or a folder written by PEFT or diffusers that contains one.

    Raises:
        ArtefactError: the file cannot be read, is not safetensors, or is not a supported LoRA.
        NonFiniteError: the file holds NaN or infinity.
    """
    file = locate(Path(path))
    header = dict(read_header(file))
    metadata = header.pop("__metadata__", {})
    if not header:
        raise ArtefactError(f"{file} is not a LoRA: it holds no tensors")
    keys = {key: named for key in header if (named := part_of(key)) is not None}
    unknown = [key for key in header if key not in keys]
    if unknown:
        raise unknown_keys(file, unknown, len(keys))
    if not any(part == "down" for _, part in keys.values()):
        raise ArtefactError(
            f"{file} is not a LoRA: it holds no matrices (lora_A or lora_down), only e.g. "
            f"{next(iter(keys))!r}"
        )
    for key, (_, part) in keys.items():
        check_tensor(file, key, part, header[key])
    settings, outside = _settings(file, metadata, (name for name, _ in keys.values()))
    updates = {name: _update(file, name, parts) for name, parts in _loaded(file, keys).items()}
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    except OSError as err:
        raise ArtefactError(f"{file} cannot be read ({err.strerror or err})") from err
    digest.update(outside)
    name = file.name if file == Path(path) else f"{file.parent.resolve().name}/{file.name}"
    return Lora(name, digest.hexdigest(), updates, settings)
