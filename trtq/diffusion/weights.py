"""What the files of a component hold, by their headers: names, shapes and dtypes of tensors.

Nothing here imports torch, and no tensor is read. A file that is not what its name says is refused
before anything is built of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtq.errors import ArtefactError

__all__ = [
    "SINGLE_FILE_ADVICE",
    "TensorInfo",
    "Weights",
    "check_pointers",
    "find_weights",
    "is_pointer",
    "read_header",
    "single_file_refusal",
]

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
_HEADER_BYTES = 100_000_000
"""Size limit of a header; the reference implementation of safetensors has the same."""
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8,
    "U64": 8, "F64": 8, "C64": 8, "C128": 16,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3")
"""Dtypes that weights may have; they are read as float32."""
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SINGLE_FILE = (".safetensors", ".ckpt", ".gguf", ".bin", ".pt", ".pth", ".sft")
SINGLE_FILE_ADVICE = (
    "make a folder of it first, in Python: from diffusers import StableDiffusionPipeline; "
    "StableDiffusionPipeline.from_single_file({file!r}).save_pretrained('FOLDER') (with the "
    "pipeline class of the model, e.g. StableDiffusionXLPipeline or FluxPipeline), and give FOLDER"
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors writes it: `F32`, `BF16`, `I64`, ...
        shape: its sizes.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class Weights:
    """The weights of one component.

    Attributes:
        tensors: what they hold, by name.
        variant: `fp16` of `model.fp16.safetensors`; None where the plain file is there.
    """

    tensors: dict[str, TensorInfo]
    variant: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer: the few lines that a clone has without Git LFS.

    Raises:
        ArtefactError: it cannot be read.
    """
    try:
        if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err.strerror}") from err


def check_pointers(folder: Path) -> None:
    """Refuse a component whose folder holds Git LFS pointers in the place of files.

    Raises:
        ArtefactError: it does; the message names the first.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as err:
        raise ArtefactError(f"cannot read {folder}: {err.strerror}") from err
    for path in files:
        if is_pointer(path):
            raise ArtefactError(
                f"{path} is a Git LFS pointer, not the file itself; install git-lfs and run `git "
                "lfs pull` in the clone, or download the repository with `hf download`"
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, checked against the size of the file.

    Raises:
        ArtefactError: it cannot be read, is cut short, or its header does not hold.
    """
    if not path.is_file():
        raise ArtefactError(f"there is no file {path}")
    if is_pointer(path):
        check_pointers(path.parent)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if size < 10:
                raise ArtefactError(f"{path} is no safetensors file: it is {size} bytes long")
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                kind = _other_format(head)
                raise ArtefactError(
                    f"{path} is no whole safetensors file: its header would be {length:,} bytes "
                    f"long, and the file is {size:,} bytes{kind}; download it again"
                )
            raw = file.read(length)
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as err:
        raise ArtefactError(f"cannot read {path}: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise ArtefactError(
            f"{path} is no safetensors file: its header is damaged ({err})"
        ) from err
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is no safetensors file: its header is no object")
    return dict(_entries(path, header, size - 8 - length))


def _other_format(head: bytes) -> str:
    if head.startswith(b"GGUF"):
        return " (it is GGUF)"
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return " (it is a pickle of torch.save)"
    return " (it is text)" if head.isascii() and head.decode("ascii").isprintable() else ""


def _entries(path: Path, header: dict[str, Any], size: int) -> Iterator[tuple[str, TensorInfo]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise ArtefactError(f"{path}: the header's entry of {name!r} is no object")
        dtype: Any = entry.get("dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise ArtefactError(f"{path}: {name!r} has the unknown dtype {dtype!r}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise ArtefactError(
                f"{path}: the header's entry of {name!r} is damaged: shape {shape!r}, offsets "
                f"{offsets!r}"
            )
        tensor = TensorInfo(dtype, tuple(shape), path)
        if offsets[1] - offsets[0] != tensor.nbytes:
            raise ArtefactError(
                f"{path}: {name!r} is {tensor.nbytes:,} bytes by its shape and "
                f"{offsets[1] - offsets[0]:,} by its offsets"
            )
        if offsets[1] > size:
            raise ArtefactError(
                f"{path} is cut short: {name!r} ends at byte {offsets[1]:,} of its data, and "
                f"{size:,} are there; download it again"
            )
        yield name, tensor


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _variant_of(name: str, stem: str) -> str | None:
    """`model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors` and the index's names -> `fp16`.

    The plain file gives the empty text, a file of another kind None.
    """
    if not name.startswith(f"{stem}.") and not name.startswith(f"{stem}-"):
        return None
    rest = name[len(stem) :]
    if rest == ".safetensors" or rest == ".safetensors.index.json":
        return ""
    if rest.startswith(".safetensors.index.") and rest.endswith(".json"):
        return rest[len(".safetensors.index.") : -len(".json")]
    if rest.startswith(".") and rest.endswith(".safetensors"):
        return rest[1 : -len(".safetensors")].partition("-")[0]
    return None


def find_weights(folder: Path, stem: str | None = None) -> Weights:
    """The weights in a component's folder: one file or several shards, of the one variant that is there.

    Args:
        folder: of the component.
        stem: what the weights' names begin with; None: either of diffusers' and transformers' own.

    Raises:
        ArtefactError: there are none, several variants, no safetensors, or a damaged file.
    """
    check_pointers(folder)
    names = sorted(path.name for path in folder.iterdir())
    stems = _STEMS if stem is None else (stem,)
    chosen = next((s for s in stems if any(_variant_of(n, s) is not None for n in names)), None)
    if chosen is None:
        raise ArtefactError(_no_weights(folder, names, stems[0]))
    variants = {v: n for n in names if (v := _variant_of(n, chosen)) is not None}
    if "" not in variants and len(variants) > 1:
        raise ArtefactError(
            f"{folder} holds the variants {', '.join(sorted(variants))} of its weights and no "
            f"plain ones; keep one of them, or rename its file to {chosen}.safetensors"
        )
    variant = "" if "" in variants else next(iter(variants))
    dotted = f".{variant}" if variant else ""
    index = folder / f"{chosen}.safetensors.index{dotted}.json"
    whole = folder / f"{chosen}{dotted}.safetensors"
    if not index.is_file() and not whole.is_file():
        raise ArtefactError(
            f"{folder} holds neither {whole.name} nor {index.name}, but {variants[variant]}; "
            "download the whole folder"
        )
    # diffusers and transformers look for an index first; a file beside it would never be read.
    tensors = _sharded(index) if index.is_file() else read_header(whole)
    if not tensors:
        raise ArtefactError(f"{whole} holds no tensors")
    return Weights(tensors, variant or None)


def _no_weights(folder: Path, names: list[str], stem: str) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".msgpack", ".h5"))]
    if pickles:
        return (
            f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run any code "
            "when it is read, so trtq reads safetensors only; if you trust where it comes from, "
            "convert the pipeline in Python: pipe = DiffusionPipeline.from_pretrained('THE "
            "FOLDER', use_safetensors=False); pipe.save_pretrained('NEW FOLDER', "
            "safe_serialization=True)"
        )
    if others:
        return (
            f"{folder} holds no {stem}.safetensors; {others[0]} is not read, since diffusers' "
            "layout names it otherwise: rename it if it is this component's weights in diffusers' "
            "own names"
        )
    return f"{folder} holds no weights: {stem}.safetensors is missing"


def _sharded(index: Path) -> dict[str, TensorInfo]:
    # Imported here: layout imports this module.
    from trtq.diffusion.layout import read_json

    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ArtefactError(f"{index} holds no weight_map of tensors to files")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted({str(file) for file in where.values()}):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArtefactError(f"{index} names the shard {name!r}, which is not a file beside it")
        path = index.parent / name
        if not path.is_file():
            raise ArtefactError(
                f"{index} names the shard {name!r}, which is missing; download the whole folder"
            )
        held = read_header(path)
        twice = sorted(tensors.keys() & held.keys())
        if twice:
            raise ArtefactError(
                f"{index.parent}: {twice[0]!r} is in two shards, one of them {name}"
            )
        tensors |= held
    absent = sorted(name for name in where if name not in tensors)
    stray = sorted(name for name in tensors if name not in where)
    if absent or stray:
        raise ArtefactError(
            f"{index} and its shards disagree about {(absent or stray)[0]!r} "
            f"({len(absent)} tensors are not in the shards, {len(stray)} not in the index)"
        )
    return tensors


def single_file_refusal(path: Path) -> str | None:
    """What to say of a checkpoint in a single file, or a folder that holds only such; None for others.

    Raises:
        ArtefactError: it is a Git LFS pointer, or cannot be read.
    """
    if path.is_file() and path.suffix.lower() in SINGLE_FILE:
        return f"{path} is a single-file checkpoint" + _instead(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SINGLE_FILE and p.is_file())
        if found:
            return (
                f"{path} holds no model_index.json, so it is no diffusers pipeline, but the "
                f"single-file checkpoint {found[0].name}"
            ) + _instead(found[0])
    return None


def _instead(path: Path) -> str:
    """What a single file is beyond that, and what to do."""
    if is_pointer(path):
        check_pointers(path.parent)
    if path.suffix.lower() == ".gguf":
        return (
            ", and GGUF is quantised already; give the folder of the float pipeline it was made of"
        )
    if path.suffix.lower() in (".safetensors", ".sft"):
        names = read_header(path)
        if names and all("lora" in name.lower() or name.endswith(".alpha") for name in names):
            return " of a LoRA; give the pipeline as the model, and this file with --lora"
    return ", which trtq does not read yet; " + SINGLE_FILE_ADVICE.format(file=str(path))
