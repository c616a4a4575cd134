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
import json
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtq.documents import MAX_BYTES
from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.lora.settings import Settings, parse_json, read_settings

__all__ = ["Lora", "LoraRequest", "LowRank", "parse_lora", "read_lora"]

_ADAPTER_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"
# The ends of keys, and the part of an update that they are.
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
# Old processors of diffusers, and those of XLabs, name their own layers: `to_q_lora.down.weight`,
# `qkv_lora2.up.weight`.
_PROCESSOR = re.compile(r"^(.+)_lora(\d?)\.(down|up)\.weight$")
_SIDES = {"down": "lora_A/lora_down", "up": "lora_B/lora_up"}
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ALPHA_TYPES = {*_FLOATS, "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
_MAX_HEADER = 100_000_000
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# Other adapters, by what stands in their keys.
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
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA as it was asked for.

    Attributes:
        path: the file, or a folder of PEFT or diffusers that holds one.
        scale: its strength.
    """

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:SCALE]` -> a `LoraRequest`.

    Raises:
        UsageError: the scale is not a finite number, or there is no file's name.
    """
    path, colon, number = text.rpartition(":")
    if not text.strip() or (colon and not path.strip()):
        raise UsageError(f"--lora {text!r} names no file; write FILE or FILE:0.8")
    if not colon or (
        len(path) == 1 and not Path(text).is_file() and number.startswith(("\\", "/"))
    ):
        return LoraRequest(Path(text))
    try:
        if Path(text).exists():
            return LoraRequest(Path(text))
        scale = float(number)
    except (OSError, ValueError):
        scale = float("nan")
    if scale != scale or abs(scale) == float("inf"):
        raise UsageError(f"--lora {text!r}: the scale {number!r} is not a number; write FILE:0.8")
    return LoraRequest(Path(path), scale)


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


def _regular(path: Path, what: str) -> None:
    """Refuse what is no file, without opening it.

    Raises:
        ArtefactError: it is missing, or a folder, a pipe or the like.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as err:
        raise ArtefactError(f"there is no {what} {path}") from err
    if not stat.S_ISREG(mode):
        raise ArtefactError(f"{path} is not a file (a pipe, a socket or a device); give a {what}")


def _located(path: Path) -> Path:
    """The file that is meant by a file or a folder.

    Raises:
        ArtefactError: there is none, or more than one.
    """
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as err:
        raise ArtefactError(f"there is no LoRA file {path}") from err
    if not is_folder:
        _regular(path, "LoRA file")
        return path
    names = sorted(file.name for file in path.iterdir())
    for usual in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if usual in names:
            _regular(path / usual, "LoRA file")
            return path / usual
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        _regular(path / files[0], "LoRA file")
        return path / files[0]
    if files:
        raise ArtefactError(
            f"{path} holds {len(files)} files; give one of them: {', '.join(files[:4])}"
        )
    pickled = [name for name in names if Path(name).suffix in _PICKLED]
    inside = [name for name in names if (path / name / "adapter_config.json").is_file()]
    if inside:
        hint = f"its adapters are in folders; give {path / inside[0]}"
    elif pickled:
        hint = f"{pickled[0]} is a pickle, which can run any code: save it as safetensors"
    else:
        hint = "give a .safetensors file, or a folder that PEFT or diffusers wrote"
    raise ArtefactError(f"the folder {path} holds no adapter_model.safetensors: {hint}")


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype and shape of every tensor, and its metadata.

    Raises:
        ArtefactError: it is no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            size = path.stat().st_size
            if not start:
                raise ArtefactError(f"{path} is empty; give a .safetensors file of a LoRA")
            if start.startswith(_LFS):
                raise ArtefactError(
                    f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
                )
            # The header's length comes first, and may begin as a pickle does.
            if start[8:9] != b"{" and (
                path.suffix in _PICKLED or start.startswith((b"PK\x03\x04", b"\x80"))
            ):
                raise ArtefactError(
                    f"{path} is a pickle, not a safetensors file; LoRAs are read from safetensors only, "
                    "since a pickle can run any code: save it as safetensors"
                )
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
                raise ArtefactError(f"{path} is not a safetensors file, or is cut short")
            file.seek(8)
            text = file.read(length)
    except OSError as err:
        raise ArtefactError(f"{path} cannot be read ({err.strerror or err})") from err

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in it")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as err:
        raise ArtefactError(
            f"{path} is not a safetensors file (its header is damaged: {err})"
        ) from err
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise ArtefactError(f"{path} is not a safetensors file (its header is no table of tensors)")
    return found


def _part(key: str) -> tuple[str, str] | None:
    """A key -> (name of the layer, part of its update); `None` if it is of no LoRA."""
    for pattern, part in _PARTS:
        if match := pattern.match(key):
            return match[1], part
    if match := _PROCESSOR.match(key):
        return match[1] + match[2], match[3]
    return None


def _unknown(path: Path, keys: list[str], known: int) -> ArtefactError:
    """What to say of keys that are of no LoRA."""
    plain = "what is read are LoRA and DoRA in the layouts of PEFT, diffusers, kohya and ComfyUI"
    for key in keys:
        for pattern, kind in _OTHERS:
            if re.search(pattern, key):
                return ArtefactError(f"{path} holds {kind} ({key!r}), which is not merged; {plain}")
    if known:
        return ArtefactError(
            f"{path} holds {len(keys)} tensors that are no part of a LoRA, e.g. {keys[0]!r}; {plain}"
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
        f"{path} is not a LoRA: none of its {len(keys)} tensors is part of one, e.g. {keys[0]!r}; it "
        f"looks like {looks}; {plain}"
    )


def _checked(path: Path, key: str, part: str, row: Mapping[str, Any]) -> None:
    """Refuse a tensor by its header.

    Raises:
        ArtefactError: it has a type or a shape that its part of an update cannot have.
    """
    kind, shape = row.get("dtype"), row.get("shape")
    if not isinstance(kind, str) or kind not in (_ALPHA_TYPES if part == "alpha" else _FLOATS):
        raise ArtefactError(
            f"{path}: {key!r} is of type {kind}; what is allowed is float32, float16, bfloat16, float64 "
            "and float8 (e4m3fn, e5m2)"
        )
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtefactError(f"{path}: {key!r} has no shape; the file is damaged")
    count = 1
    for size in shape:
        count *= size
    if part == "alpha" and count != 1:
        raise ArtefactError(f"{path}: {key!r} has shape {shape}; an alpha is one number")
    if part in _SIDES and len(shape) < 2:
        raise ArtefactError(
            f"{path}: {key!r} has shape {shape}; a matrix has at least two dimensions"
        )
    if count == 0:
        raise ArtefactError(
            f"{path}: {key!r} has shape {shape}: a LoRA of rank 0 or without channels changes nothing; "
            "the rank must be at least 1"
        )


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
