"""LoRA files of every layout, from safetensors only.

    PEFT             base_model.model.….to_q.lora_A.weight, …lora_B.weight and adapter_config.json
    diffusers        unet.down_blocks.0.….to_q.lora_A.weight, …lora_B.weight, settings in the metadata
                     older: ….lora.down.weight, ….lora.up.weight, ….lora_linear_layer.down.weight
                     or     ….processor.to_q_lora.down.weight
    kohya            lora_unet_down_blocks_0_…_to_q.lora_down.weight, …lora_up.weight, ….alpha
    ComfyUI          diffusion_model.….lora_A.weight or lora_down.weight

An update is `scale * alpha / rank * up @ down`; without an `alpha` it is `scale * up @ down`. What
the names mean is in `trtq.lora.names`, what PEFT's settings mean in `trtq.lora.settings`.
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
from trtq.lora.file import _header, _located, _regular
from trtq.lora.keys import _SIDES, _checked, _part, _unknown
from trtq.lora.settings import Settings, parse_json, read_settings

__all__ = ["Lora", "LowRank", "read_lora"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """One update, as the file holds it; all tensors in float32.

    Attributes:
        down: `[R, K, ...]`.
        up: `[N, R, ...]`.
        mid: `[R, R, kh, kw]` of a convolution that LoCon takes apart in three, or `None`.
        alpha: of the file; `None` where it says none.
        bias: `[N]`, added to the layer's bias (`lora_bias`), or `None`.
        magnitude: DoRA's norm of each output channel, `[N]`, or `None`.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    alpha: float | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file.

    Attributes:
        name: the file's, with its folder's if that was given.
        sha256: of its content, and of the `adapter_config.json` that gives its strength.
        updates: by the name that the file gives the layer.
        settings: PEFT's, by component; under `""` for all of them.
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
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key, (name, part) in keys.items():
                tensor = file.get_tensor(key).to(torch.float32)
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(
                        f"{path}: {key!r} holds NaN or infinity; the LoRA is damaged"
                    )
                if part in found.setdefault(name, {}):
                    raise ArtefactError(
                        f"{path} gives {name!r} twice (again as {key!r}); a file holds one adapter"
                    )
                found[name][part] = tensor
    except (OSError, SafetensorError) as err:
        raise ArtefactError(f"{path} is not a safetensors file, or is cut short ({err})") from err
    return found


def _update(path: Path, name: str, parts: Mapping[str, Tensor]) -> LowRank:
    """One layer's update from its tensors.

    Raises:
        ArtefactError: a part is missing, or they do not fit one another.
    """
    for side, words in _SIDES.items():
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
            "lora_B (up) must be the first of lora_A (down), the rank"
        )
    if "magnitude" in parts and "dora_scale" in parts:
        raise ArtefactError(
            f"{path} gives DoRA's magnitude of {name!r} twice; a file holds one adapter"
        )
    for part in ("bias", "magnitude", "dora_scale"):
        # LyCORIS can keep the norms of input channels, `[1, K]`; those of PEFT and kohya are of outputs.
        # PEFT writes `[1, N, 1, 1]` for a convolution.
        if part in parts and (
            parts[part].numel() != len(up) or (part == "dora_scale" and len(parts[part]) != len(up))
        ):
            kind = "the bias" if part == "bias" else "DoRA's magnitude"
            raise ArtefactError(
                f"{path}: {kind} of {name!r} has shape {tuple(parts[part].shape)}; what is merged is "
                f"one number for each of its {len(up)} output channels"
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
    """PEFT's settings of a file, and what of them lies outside the file.

    Raises:
        ArtefactError: they are damaged, or cannot be followed.
    """
    beside = path.parent / "adapter_config.json"
    # PEFT keeps them beside the one file that it writes; a folder may hold other LoRAs, too.
    if path.name == "adapter_model.safetensors" or any(n.startswith("base_model.") for n in names):
        if beside.exists():
            _regular(beside, "adapter_config.json")
            try:
                if (size := beside.stat().st_size) > MAX_BYTES:
                    raise ArtefactError(
                        f"{beside} has {size:,} bytes; at most {MAX_BYTES:,} are read"
                    )
                text = beside.read_bytes()
            except OSError as err:
                raise ArtefactError(f"{beside} cannot be read ({err.strerror or err})") from err
            return {"": read_settings(parse_json(text, str(beside)), str(beside))}, text
        if path.name == "adapter_model.safetensors":
            raise ArtefactError(
                f"{path} is an adapter of PEFT, whose strength is in adapter_config.json; there is none "
                "beside it"
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
    return {name: read_settings(found, where) for name, found in components.items()}, b""


def read_lora(path: Path) -> Lora:
    """Read a LoRA.

    Args:
        path: a safetensors file, or a folder of PEFT or diffusers with one.

    Raises:
        ArtefactError: it cannot be read, is not safetensors, or holds what is no LoRA.
        NonFiniteError: it holds NaN or infinity.
    """
    file = _located(Path(path))
    header = _header(file)
    metadata = header.pop("__metadata__", {})
    if not header:
        raise ArtefactError(f"{file} is not a LoRA: it holds no tensors")
    keys = {key: found for key in header if (found := _part(key)) is not None}
    strange = [key for key in header if key not in keys]
    if strange or not any(part == "down" for _, part in keys.values()):
        if not strange:
            raise ArtefactError(
                f"{file} is not a LoRA: it holds no matrices (lora_A or lora_down), only e.g. "
                f"{next(iter(keys))!r}"
            )
        raise _unknown(file, strange, len(keys))
    for key, (_, part) in keys.items():
        _checked(file, key, part, header[key])
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
