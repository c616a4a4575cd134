"""The weight files of a component (plain, sharded or a variant), and advice about other formats.

This module does not import torch and reads no tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtq.checkpoint.layout import INDEX_NAME, read_json
from trtq.checkpoint.weights import TensorInfo, Weights, check_pointers, is_pointer, read_header
from trtq.errors import ArtefactError

__all__ = [
    "find_weights",
    "has_weights",
    "is_single_file",
    "lora_refusal",
    "single_file",
    "single_file_refusal",
]

_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SAFE = (".safetensors", ".sft")
_SINGLE_FILE = (*_SAFE, *_PICKLES, ".gguf")
_SINGLE_FILE_ADVICE = (
    "convert it to a folder in Python: from diffusers import StableDiffusionPipeline; "
    "StableDiffusionPipeline.from_single_file({file!r}).save_pretrained('FOLDER') (with the "
    "pipeline class of the model, e.g. StableDiffusionXLPipeline or FluxPipeline), and give FOLDER"
)
_LORA = " of a LoRA; give a pipeline as the model, and this file with --lora"


def _variant_of(name: str, stem: str) -> str | None:
    """The variant in a file name, e.g. `fp16`; "" for a plain name, None for other files.

    File names are `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, and
    `model.safetensors.index.fp16.json`, with `model` as the stem.
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


def has_weights(folder: Path) -> bool:
    """Whether a component's folder holds safetensors files of a name that diffusers expects."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(_variant_of(name, stem) is not None for name in names for stem in _STEMS)


def is_single_file(path: Path) -> bool:
    """Whether a path is a safetensors file, by its suffix."""
    return path.suffix.lower() in _SAFE and path.is_file()


def single_file(model: Any) -> Path | None:
    """The path of a single-file checkpoint; None if the model is of another kind.

    Raises:
        ArtefactError: the file cannot be read, or holds a LoRA.
    """
    if not isinstance(model, str | Path) or "\0" in str(model):
        return None
    try:
        if not is_single_file(Path(model)):
            return None
    except OSError:
        # `resolve_model` reports the error.
        return None
    if (refusal := lora_refusal(Path(model))) is not None:
        raise ArtefactError(refusal)
    return Path(model)


def find_weights(folder: Path, stem: str | None = None) -> Weights:
    """Headers of the weights in a component's folder, from one file or from shards.

    Args:
        folder: folder of the component.
        stem: start of the file names; None: the default of diffusers or of transformers.

    Raises:
        ArtefactError: there are no safetensors files, several variants, or a damaged file.
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
            f"{folder} holds its weights in the variants {', '.join(sorted(variants))} but not in a "
            f"plain file; keep one variant, or rename its file to {chosen}.safetensors"
        )
    variant = "" if "" in variants else next(iter(variants))
    dotted = f".{variant}" if variant else ""
    index = folder / f"{chosen}.safetensors.index{dotted}.json"
    single = folder / f"{chosen}{dotted}.safetensors"
    if not index.is_file() and not single.is_file():
        raise ArtefactError(
            f"{folder} holds {variants[variant]} but neither {single.name} nor {index.name}; "
            "download the whole folder"
        )
    # diffusers and transformers prefer an index and then ignore a single file.
    tensors = _read_shards(index) if index.is_file() else read_header(single)
    if not tensors:
        raise ArtefactError(f"{single} holds no tensors; download it again")
    return Weights(tensors, variant or None)


def _no_weights(folder: Path, names: list[str], stem: str) -> str:
    """Message about a folder without safetensors files of the expected name."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".msgpack", ".h5"))]
    if pickles:
        return (
            f"{folder} holds its weights only as a pickle ({pickles[0]}). Reading a pickle can run "
            "any code, so trtq reads safetensors only; if you trust the origin of the file, convert "
            "the pipeline in Python: from diffusers import DiffusionPipeline; pipe = "
            f"DiffusionPipeline.from_pretrained({str(folder.parent)!r}, use_safetensors=False); "
            "pipe.save_pretrained('NEW FOLDER', safe_serialization=True)"
        )
    if others:
        return (
            f"{folder} holds no {stem}.safetensors; {others[0]} is ignored, because diffusers "
            "expects another file name. Rename the file if it holds this component's weights under "
            "diffusers' tensor names"
        )
    return f"{folder} holds no weights: {stem}.safetensors is missing; download the whole folder"


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    """Headers of all shards that an index names.

    Raises:
        ArtefactError: a shard is missing or damaged, or does not match the index.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ArtefactError(f"{index} holds no weight_map from tensors to files")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted({str(file) for file in files.values()}):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ArtefactError(
                f"{index} names the shard {name!r}, which is not a file in the same folder"
            )
        path = index.parent / name
        if not path.is_file():
            raise ArtefactError(
                f"{index} names the shard {name!r}, which is missing; download the whole folder"
            )
        shard = read_header(path)
        duplicates = sorted(tensors.keys() & shard.keys())
        if duplicates:
            raise ArtefactError(
                f"{index.parent}: {duplicates[0]!r} is in two shards, {name} and an earlier one"
            )
        tensors |= shard
    absent = sorted(name for name in files if name not in tensors)
    unlisted = sorted(name for name in tensors if name not in files)
    if absent or unlisted:
        raise ArtefactError(
            f"{index} and its shards disagree about {(absent or unlisted)[0]!r} "
            f"({len(absent)} tensors are not in the shards, {len(unlisted)} not in the index); "
            "download the whole folder"
        )
    return tensors


def single_file_refusal(path: Path) -> str | None:
    """Message about a checkpoint file that trtq does not read here, or its folder; None for others.

    Args:
        path: a checkpoint file, or a folder without an index.

    Raises:
        ArtefactError: the file is a Git LFS pointer, or cannot be read.
    """
    if path.is_file() and path.suffix.lower() in _SINGLE_FILE:
        if is_single_file(path) and lora_refusal(path) is None:
            return (
                f"{path} is a single-file checkpoint, which only trtq quantize, export and inspect "
                "take; for other commands " + _SINGLE_FILE_ADVICE.format(file=str(path))
            )
        return f"{path} is a single-file checkpoint" + _conversion(path)
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.suffix.lower() in _SINGLE_FILE and p.is_file()
        )
        if files:
            file = next((p for p in files if is_single_file(p)), files[0])
            return (
                f"{path} holds no {INDEX_NAME}, so it is not a diffusers pipeline, but it holds the "
                f"single-file checkpoint {file.name}"
            ) + _conversion(file)
    return None


def lora_refusal(path: Path) -> str | None:
    """Message about a safetensors file that holds a LoRA; None for other files.

    Raises:
        ArtefactError: the file cannot be read.
    """
    names = read_header(path)
    if names and all("lora" in name.lower() or name.endswith(".alpha") for name in names):
        return f"{path} is a single-file checkpoint" + _LORA
    return None


def _conversion(path: Path) -> str:
    """End of a message: the kind of a single file and how to use it."""
    if is_pointer(path):
        check_pointers(path.parent)
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return (
            ", and GGUF is already quantised; give the folder, or the safetensors file, of the float "
            "pipeline that it was made from"
        )
    if suffix in _SAFE:
        if lora_refusal(path) is not None:
            return _LORA
        return f"; give the file itself: {path} (trtq quantize, export and inspect take it)"
    return (
        " in a pickle. Reading a pickle can run any code, so trtq reads safetensors only; if you trust "
        "the origin of the file, " + _SINGLE_FILE_ADVICE.format(file=str(path))
    )
