"""The record that travels with every artefact, and the rules for writing and reading one.

An artefact is a folder with a `manifest.json` that names the SHA-256 of every file beside it, and of
nothing else. It is written into a hidden folder beside its place and renamed when complete, so a folder
that has a manifest is whole. Reading verifies the format version, that every path stays inside the
folder, every hash, and that no other file is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from trtq.errors import ArtefactError, IntegrityError, UsageError

__all__ = [
    "CHECKPOINTS",
    "MANIFEST_NAME",
    "LayerRow",
    "Manifest",
    "SourceRow",
    "StructureRow",
    "artefact_kind",
    "file_hashes",
    "find_origin",
    "made_from",
    "new_artefact",
    "package_versions",
    "partial_folder",
    "put_in_place",
    "read_manifest",
    "sha256",
    "write_manifest",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
CHECKPOINTS = "checkpoints"
Kind = Literal["run", "onnx", "engine"]

_PACKAGES = (
    "trtq",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnx-ir",
    "onnxruntime-openvino",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(_Strict):
    """What one linear, convolution or product of activations became.

    Attributes:
        name: module path in the denoiser.
        kind: `linear`, `conv2d` or `product`.
        weight_bits: None: there is no weight, or the layer runs in float.
        activation_bits: of the (first) input; None: the layer runs in float.
        right_bits: of a product's second input.
        adapters: whether fine-tuning gave it QALoRA adapters.
        reason: why.
        input_of: an earlier layer that gets the same input, and whose quantiser it uses.
    """

    name: str
    kind: Literal["linear", "conv2d", "product"]
    weight_bits: int | None
    activation_bits: int | None
    right_bits: int | None = None
    adapters: bool = False
    reason: str
    input_of: str | None = None


class StructureRow(_Strict):
    """What was brought into another form before quantising.

    Attributes:
        attention: paths of attention modules that are spelled out.
        splits: input channels of the first part, by path of a split convolution.
    """

    attention: list[str] = []
    splits: dict[str, int] = {}


class SourceRow(_Strict):
    """What an artefact was made from.

    Attributes:
        name: as the user gave it.
        files: SHA-256 of the files that went in, by path inside the source.
    """

    name: str
    files: dict[str, str]


class Manifest(_Strict):
    """Contents of `manifest.json`.

    Attributes:
        format_version: of this record.
        kind: what the folder is.
        files: SHA-256 of every file in the folder, by relative POSIX path.
        source: what it was made from.
        denoiser: name of the denoiser component, e.g. `unet`.
        recipe: how it was quantised; None for a float model.
        timesteps: the calibrated timesteps, cleanest first; None for a float model.
        layers: one row per linear, convolution and spelled-out product of the denoiser.
        structure: modules that were brought into another form, see `trtq.quant.structure`.
        loras: LoRAs merged into the weights before quantising.
        options: what the stage was asked for beyond the recipe.
        metrics: what was measured while making it.
        packages: versions of what made it.
    """

    format_version: int = FORMAT_VERSION
    kind: Kind
    files: dict[str, str] = {}
    source: SourceRow
    denoiser: str
    recipe: dict[str, Any] | None = None
    timesteps: list[float] | None = None
    layers: list[LayerRow] = []
    structure: StructureRow = StructureRow()
    loras: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    packages: dict[str, str] = {}


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape an artefact."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, the manifest and checkpoints left out."""
    return {name: sha256(folder / name) for name in _artefact_files(folder)}


def _artefact_files(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (CHECKPOINTS, MANIFEST_NAME)
    ]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of a finished folder and write its manifest, last of all."""
    complete = manifest.model_copy(
        update={"files": file_hashes(folder), "packages": package_versions()}
    )
    (folder / MANIFEST_NAME).write_text(complete.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return complete


def made_from(folder: Path, manifest: Manifest) -> SourceRow:
    """What an artefact that is made from another one says of it."""
    own = {MANIFEST_NAME: sha256(folder / MANIFEST_NAME)}
    return SourceRow(name=folder.name, files=own | manifest.files)


def find_origin(folder: Path, manifest: Manifest, given: str | Path | None = None) -> Path | None:
    """The artefact that another one was made from, if it is still what it was.

    Args:
        folder: the other one.
        manifest: of the other one.
        given: where it lies; by default it is looked for beside the other one, then where we are.

    Returns:
        None if it is not there, or changed, or what it was made from was no artefact of ours.
    """
    expected = manifest.source.files.get(MANIFEST_NAME)
    name = manifest.source.name
    places = (folder.resolve().parent / name, Path(name)) if given is None else (Path(given),)
    for place in places:
        own = place / MANIFEST_NAME
        if expected is not None and own.is_file() and sha256(own) == expected:
            return place
    return None


def artefact_kind(folder: Path) -> Kind | None:
    """What kind of artefact a folder is; None if it is none of ours.

    Raises:
        ArtefactError: it has a manifest that cannot be read.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    return _parse(folder).kind


def _parse(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ArtefactError(f"{folder} holds no readable {MANIFEST_NAME}") from err
    try:
        version = json.loads(text)["format_version"]
    except (ValueError, KeyError, TypeError) as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {err!r}") from err
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{folder} has format version {version}, this trtq reads {FORMAT_VERSION}; make it again "
            "with this version"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path} is not a manifest of trtq: {place}: {first['msg']}") from err


def _checked_path(folder: Path, relative: str) -> Path:
    """The file that a manifest names.

    Raises:
        IntegrityError: the path leaves the folder.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or "\\" in relative
        or ":" in relative
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise IntegrityError(
            f"{folder / MANIFEST_NAME} names {relative!r}, which leaves the folder; do not use it"
        )
    return path


def read_manifest(folder: Path, *kinds: Kind) -> Manifest:
    """Read and verify the manifest of an artefact.

    Args:
        folder: the artefact.
        kinds: what it may be; any kind if none is given.

    Raises:
        ArtefactError: there is no such artefact, or it is of another kind.
        IntegrityError: the version is unknown, a path leaves the folder, a file is missing or has
            another content than the manifest says.
    """
    manifest = _parse(folder)
    if kinds and manifest.kind not in kinds:
        raise ArtefactError(
            f"{folder} is of kind {manifest.kind!r}; needed is {' or '.join(kinds)}"
        )
    for relative, expected in manifest.files.items():
        path = _checked_path(folder, relative)
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, though the manifest lists it")
        if sha256(path) != expected:
            raise IntegrityError(
                f"{path} is not what the manifest says (SHA-256 differs): it was changed or damaged"
            )
    surplus = sorted(set(_artefact_files(folder)) - set(manifest.files))
    if surplus:
        raise IntegrityError(
            f"{folder / surplus[0]} is not in the manifest; an artefact holds nothing else, remove it"
        )
    return manifest


def partial_folder(final: Path) -> Path:
    """Where an artefact is written until it is complete; hidden, and named so that it is ours."""
    return final.with_name(f".{final.name}.trtq-partial")


def put_in_place(partial: Path, final: Path) -> None:
    """Move a complete folder to its place; what is there already comes back if that fails."""
    old = final.with_name(f".{final.name}.trtq-old")
    shutil.rmtree(old, ignore_errors=True)
    replaced = final.exists()
    if replaced:
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if replaced:
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_artefact(
    final: Path, *, overwrite: bool = False, keep_partial: bool = False
) -> Iterator[Path]:
    """Write an artefact beside its place and move it there when the block ends well.

    Args:
        final: where it will lie.
        overwrite: replace an artefact that is already there.
        keep_partial: leave the partial folder on an error, if there is a checkpoint in it, and start
            from one that is there; for stages that can be resumed.

    Yields:
        The folder to write into.

    Raises:
        UsageError: something is there already that must not be replaced, or nothing can be written.
        ArtefactError: the disk is full, or fails.
    """
    final = check_output(final, overwrite=overwrite)
    partial = partial_folder(final)
    if not keep_partial:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UsageError(f"cannot write to {final}: {err}") from err
    try:
        yield partial
        put_in_place(partial, final)
    except BaseException as err:
        kept = keep_partial and (partial / CHECKPOINTS).is_dir()
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        # A full disk, mostly; safetensors has an exception of its own for it.
        if isinstance(err, OSError | SafetensorError):
            what = "its checkpoints are kept for --resume" if kept else "nothing of it is left"
            raise ArtefactError(f"writing {final} failed, {what}: {err}") from err
        raise


def check_output(final: Path, *, overwrite: bool, source: str | Path | Any = None) -> Path:
    """Refuse an output place before any long work; the place without links is given back.

    Args:
        final: the place.
        overwrite: whether an artefact that is there may be replaced.
        source: what is read; it must not be replaced, nor lie inside what is.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    final = final.resolve()
    if isinstance(source, str | Path) and Path(source).exists():
        place = Path(source).resolve()
        if place == final or final in place.parents or place in final.parents:
            raise UsageError(
                f"the output {final} and the input {place} are the same place or inside each other; "
                "choose another --output"
            )
    if not final.exists():
        return final
    if not (final / MANIFEST_NAME).is_file():
        if final.is_dir() and not any(final.iterdir()):
            return final
        raise UsageError(f"{final} exists and is not an artefact of trtq; choose another --output")
    if not overwrite:
        raise UsageError(f"{final} exists; choose another --output or pass --overwrite")
    return final
