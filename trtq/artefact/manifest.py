"""The record that travels with every artefact, and the rules for writing and reading one.

An artefact is a folder with a `manifest.json` that names the SHA-256 of every file of it. It is written
into a hidden folder beside its place and renamed when complete, so a folder with a manifest is whole.
Reading verifies the format version, that every path stays inside the folder, and every hash. A file
that the manifest does not name (a README, what a file manager or git leaves) is left alone and warned of
once, unless something that opens the artefact would read it: that is an error.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError

from trtq.artefact.contents import find_strays
from trtq.artefact.graph_metadata import check_layers, check_timesteps
from trtq.artefact.outputs import (
    CHECKPOINTS,
    RESUMABLE,
    Owned,
    check_place,
    claim,
    files_below,
    has_checkpoint,
    is_empty,
    partial_folder,
    read_listing,
    recover,
    remove_partial,
    replace_folder,
    sha256,
    special_kind,
    strip_partial,
)
from trtq.artefact.records import (
    Bits,
    Digest,
    FileName,
    Given,
    Metrics,
    ModulePath,
    Number,
    Options,
    RecipeRow,
    Text,
    checked_by,
    path_fault,
)
from trtq.documents import explain_first, parse_json, read_text, shown
from trtq.errors import ArtefactError, IntegrityError, UsageError

__all__ = [
    "CHECKPOINTS",
    "MANIFEST_NAME",
    "Kind",
    "LayerRow",
    "Manifest",
    "SourceRow",
    "StructureRow",
    "artefact_kind",
    "check_kind",
    "check_output",
    "check_outside_artefacts",
    "claimed",
    "claims_output",
    "file_hashes",
    "find_origin",
    "made_from",
    "new_artefact",
    "owned_by_trtq",
    "package_versions",
    "parse_manifest",
    "partial_folder",
    "put_in_place",
    "read_manifest",
    "sha256",
    "verify_files",
    "write_manifest",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
Kind = Literal["run", "onnx", "engine"]

logger = logging.getLogger(__name__)

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

    name: ModulePath
    kind: Literal["linear", "conv2d", "product"]
    weight_bits: Bits | None
    activation_bits: Bits | None
    right_bits: Bits | None = None
    adapters: Annotated[bool, Field(strict=True)] = False
    reason: Text
    input_of: ModulePath | None = None

    @model_validator(mode="after")
    def _possible(self) -> LayerRow:
        widths = (self.weight_bits, self.activation_bits, self.right_bits)
        quantized = tuple(bits is not None for bits in widths)
        whole = (False, True, True) if self.kind == "product" else (True, True, False)
        if quantized not in (whole, (False, False, False)):
            raise ValueError(
                f"{self.name!r} is of kind {self.kind!r}, which has bits of "
                + ("both inputs and of no weight" if self.kind == "product" else "weight and input")
                + f", or is float; got weight, input, second input {widths}"
            )
        if self.input_of is not None and (self.kind == "product" or not quantized[1]):
            raise ValueError(f"{self.name!r} quantises no single input, so it has no input_of")
        return self


class StructureRow(_Strict):
    """What was brought into another form before quantising.

    Attributes:
        attention: paths of attention modules that are spelled out.
        splits: input channels of the first part, by path of a split convolution.
    """

    attention: list[ModulePath] = []
    splits: dict[ModulePath, Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]] = {}


class SourceRow(_Strict):
    """What an artefact was made from.

    Attributes:
        name: as the user gave it.
        files: SHA-256 of the files that went in, by path inside the source.
    """

    name: Given
    files: dict[str, Digest]


class LoraRow(_Strict):
    """A LoRA that was merged: see `trtq.lora.MergedLora`."""

    file: Given
    sha256: Digest
    scale: Number
    modules: Annotated[int, Field(strict=True, ge=0)]


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

    format_version: Annotated[int, Field(strict=True)] = FORMAT_VERSION
    kind: Kind
    files: dict[FileName, Digest] = {}
    source: SourceRow
    denoiser: Annotated[str, Field(strict=True, pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    recipe: Annotated[dict[str, Any], AfterValidator(checked_by(RecipeRow))] | None = None
    timesteps: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)] | None = None
    layers: list[LayerRow] = []
    structure: StructureRow = StructureRow()
    loras: list[Annotated[dict[str, Any], AfterValidator(checked_by(LoraRow))]] = []
    options: Annotated[dict[str, Any], AfterValidator(checked_by(Options))] = {}
    metrics: Annotated[dict[str, Any], AfterValidator(checked_by(Metrics))] = {}
    packages: dict[Text, Text] = {}

    @field_validator("files")
    @classmethod
    def _not_itself(cls, files: dict[str, str]) -> dict[str, str]:
        if MANIFEST_NAME in files:
            raise ValueError(f"{MANIFEST_NAME} cannot hold its own SHA-256")
        return files

    @field_validator("timesteps")
    @classmethod
    def _cleanest_first(cls, timesteps: list[float] | None) -> list[float] | None:
        for before, after in pairwise(timesteps or ()):
            if not before < after:
                raise ValueError(
                    f"timesteps rise from the cleanest to the noisiest, got {after:g} after {before:g}"
                )
        return timesteps

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[LayerRow]) -> list[LayerRow]:
        above: dict[str, LayerRow] = {}
        for row in layers:
            if row.name in above:
                raise ValueError(f"the layer {row.name!r} is listed twice")
            if row.input_of is not None:
                owner = above.get(row.input_of)
                if owner is None:
                    raise ValueError(
                        f"{row.name!r} has the input of {row.input_of!r}, which is no layer before it"
                    )
                if owner.activation_bits != row.activation_bits or owner.kind == "product":
                    raise ValueError(
                        f"{row.name!r} has the input of {row.input_of!r}, which is quantised otherwise"
                    )
            above[row.name] = row
        return layers

    def layer_kinds(self) -> dict[str, str]:
        """Kind and precision of every layer by its name, e.g. `conv2d w4a8`."""
        kinds = {}
        for row in self.layers:
            widths = (("w", row.weight_bits), ("a", row.activation_bits), ("a", row.right_bits))
            precision = "".join(f"{what}{bits}" for what, bits in widths if bits is not None)
            kinds[row.name] = f"{row.kind} {precision or 'float'}"
        return kinds

    def check_graph(self, metadata: Mapping[str, str]) -> None:
        """Nothing, if the denoiser's graph is the one that this manifest describes.

        Args:
            metadata: what the graph says about itself.

        Raises:
            ArtefactError: it was calibrated at other timesteps, or holds other layers or bits.
        """
        check_timesteps(metadata, self.timesteps)
        check_layers(metadata, self.layer_kinds())

    def check_whole(self) -> None:
        """Nothing, if what must be there for its kind is there.

        Raises:
            ValueError: it is not; the message names the entry.
        """
        quantized = [row.name for row in self.layers if row.activation_bits is not None]
        if self.kind == "run" and self.recipe is None:
            raise ValueError("recipe: is missing, a run has one")
        if (self.recipe is None) != (self.timesteps is None):
            raise ValueError("timesteps: must be there if there is a recipe, and only then")
        if self.recipe is None and quantized:
            raise ValueError(f"layers: {quantized[0]!r} is low-bit, though there is no recipe")
        if self.recipe is not None:
            missing = [key for key in ("method", "bits", "steps") if self.recipe.get(key) is None]
            if missing:
                raise ValueError(f"recipe.{missing[0]}: is missing")
            if not quantized:
                raise ValueError("layers: none is low-bit, though there is a recipe")
            if self.recipe.get("tables") == "static" and len(self.timesteps or ()) != 1:
                raise ValueError(
                    f"timesteps: static tables have one, got {len(self.timesteps or ())}"
                )
        needed = {"run": (), "onnx": ("size",), "engine": ("size", "backend", "architectures")}
        missing = [key for key in needed[self.kind] if self.options.get(key) is None]
        if missing:
            raise ValueError(f"options.{missing[0]}: is missing")


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
    return {
        name: sha256(folder / name)
        for name in files_below(folder)
        if name != MANIFEST_NAME
        and not name.startswith(f"{CHECKPOINTS}/")
        and (folder / name).is_file()
    }


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
    path = folder / MANIFEST_NAME
    # What is there and is no file, a pipe for instance, is refused when it is read.
    if not path.exists() and not path.is_symlink():
        return None
    return parse_manifest(folder).kind


def parse_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artefact, without hashing its files.

    Raises:
        ArtefactError: the manifest cannot be read.
        IntegrityError: it is no manifest of trtq, or one of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        found = parse_json(read_text(path))
    except ValueError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {err}") from err
    if not isinstance(found, dict) or "format_version" not in found:
        raise IntegrityError(f"{path} is not a manifest of trtq: 'format_version' is missing")
    version = found["format_version"]
    if type(version) is not int:
        raise IntegrityError(
            f"{path} is not a manifest of trtq: format_version is a number, got {shown(version)}"
        )
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{folder} has format version {version}, this trtq reads {FORMAT_VERSION}; make it again "
            "with this version"
        )
    try:
        manifest = Manifest.model_validate(found)
        manifest.check_whole()
    except ValidationError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {explain_first(err)}") from err
    except ValueError as err:
        raise IntegrityError(f"{path} is not a manifest of trtq: {err}") from err
    return manifest


def _checked_path(folder: Path, relative: str) -> Path:
    """The file that a manifest names.

    Raises:
        IntegrityError: the path leaves the folder.
    """
    fault = path_fault(relative)
    path = folder / PurePosixPath(relative) if fault is None else folder
    # realpath, since resolve() refuses links that lead round in a circle, in an error of its own.
    if fault is None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        fault = "leaves the folder"
    if fault is not None:
        raise IntegrityError(
            f"{folder / MANIFEST_NAME} names {shown(relative)}, which {fault}; do not use it"
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
            another content than the manifest says, or would be read and is not in it.
    """
    manifest = parse_manifest(folder)
    check_kind(folder, manifest, *kinds)
    verify_files(folder, manifest)
    return manifest


def check_kind(folder: Path, manifest: Manifest, *kinds: Kind) -> None:
    """Raise unless an artefact is of one of these kinds; every kind will do if none is given.

    Raises:
        ArtefactError: it is of another kind.
    """
    if kinds and manifest.kind not in kinds:
        raise ArtefactError(
            f"{folder} is of kind {manifest.kind!r}; needed is {' or '.join(kinds)}"
        )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless every file of an artefact is what its manifest says.

    Raises:
        IntegrityError: a path leaves the folder, a file is missing or has another content than the
            manifest says, or would be read and is not listed.
    """
    for relative, expected in manifest.files.items():
        path = _checked_path(folder, relative)
        special = special_kind(path)
        if special is not None:
            raise IntegrityError(f"{path} is {special}, though the manifest lists it as a file")
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, though the manifest lists it")
        if sha256(path) != expected:
            raise IntegrityError(
                f"{path} is not what the manifest says (SHA-256 differs): it was changed or damaged"
            )
    _look_for_strays(folder, manifest)


_warned: set[Path] = set()


def _look_for_strays(folder: Path, manifest: Manifest) -> None:
    """Warn once of what is not in the manifest.

    Raises:
        IntegrityError: something that opens the artefact would read it.
    """
    strays = find_strays(folder, manifest.files, MANIFEST_NAME)
    for stray in strays:
        if stray.problem is not None:
            raise IntegrityError(f"{folder / stray.name} {stray.problem}; move it out of {folder}")
    place = folder.resolve()
    if strays and place not in _warned:
        _warned.add(place)
        logger.warning(
            "%s holds %s that the manifest does not list, e.g. %s; left alone and not read",
            folder,
            f"{len(strays)} entries" if len(strays) > 1 else "1 entry",
            strays[0].name,
        )


def owned_by_trtq(folder: Path) -> Owned | None:
    """What is trtq's in a folder, as its manifest or its listing says; None: it is not one of ours."""
    if not folder.is_dir():
        return None
    if (folder / MANIFEST_NAME).is_file():
        try:
            manifest = parse_manifest(folder)
        except (ArtefactError, RecursionError):
            return None
        return Owned(manifest.kind, manifest.files, MANIFEST_NAME)
    return read_listing(folder)


_WORDS = {
    "run": "a run",
    "onnx": "an ONNX folder",
    "engine": "a folder of engines",
    "eval": "a report of trtq eval",
    "bench": "a report of trtq bench",
    "demo report": "a report of trtq demo",
    "demo": "a folder of trtq demo",
    "triton": "a Triton model repository",
}
_OTHERS = {
    "triton": "a repository that trtq made",
    "demo": "a folder that trtq demo made",
    **dict.fromkeys(("eval", "bench", "demo report"), "a report of trtq"),
}
_OPEN = ("demo",)
"""Kinds of folders that hold further results."""


def check_output(
    final: Path, *, overwrite: bool, source: str | Path | Any = None, kind: str | None = None
) -> Path:
    """Refuse an output folder before any long work; its absolute path is given back.

    Args:
        final: the place.
        overwrite: whether a folder of ours that is there may be replaced.
        source: what is read; it must not be replaced, nor lie inside what is.
        kind: what is to be written, see `Owned`; only the same kind is replaced. None: any.

    Raises:
        UsageError: something is there that must not be replaced, or nothing may be written there.
    """
    final = check_place(final, source=source)
    check_outside_artefacts(final)
    if not final.exists() or is_empty(final):
        return final
    if not final.is_dir():
        raise UsageError(f"{final} is a file; --output names a folder here")
    owned = owned_by_trtq(final)
    if owned is None:
        what = _OTHERS.get(kind or "", "an artefact of trtq")
        raise UsageError(f"{final} exists and is not {what}; choose another --output")
    if kind is not None and owned.kind != kind:
        raise UsageError(
            f"{final} exists and is {_word(owned.kind)}, which is not replaced by {_word(kind)}; choose "
            "another --output"
        )
    if not overwrite:
        raise UsageError(f"{final} exists; choose another --output or pass --overwrite")
    _check_own_files(final, owned)
    return final


def _word(kind: str) -> str:
    return _WORDS.get(kind, f"of kind {kind!r}")


def _check_own_files(final: Path, owned: Owned) -> None:
    """Nothing, if what `owned` lists is as it was written, and nothing else would be read.

    Raises:
        UsageError: the user has changed a file, or put one there that the new artefact would read.
    """
    for name, digest in owned.files.items():
        path = final / name
        try:
            _checked_path(final, name)
        except IntegrityError as err:
            raise UsageError(f"{err}; choose another --output") from err
        if digest and path.is_file() and sha256(path) != digest:
            raise UsageError(
                f"{path} was changed since trtq wrote it, and is not replaced; move it away, or choose "
                "another --output"
            )
    if owned.record != MANIFEST_NAME:
        return
    for stray in find_strays(final, owned.files, MANIFEST_NAME):
        if stray.problem is not None:
            raise UsageError(
                f"{final / stray.name} {stray.problem}; move it away before the folder is replaced, or "
                "choose another --output"
            )


def check_outside_artefacts(place: Path) -> None:
    """Nothing, if no folder around a place is an artefact or another result of ours.

    Raises:
        UsageError: one is; what it holds is on record, and nothing is put into it.
    """
    for parent in place.resolve().parents:
        around = owned_by_trtq(parent)
        if around is not None and around.kind not in _OPEN:
            raise UsageError(
                f"the output {place} lies inside {parent}, which is {_word(around.kind)}; choose "
                "another --output"
            )


@contextmanager
def claimed(final: Path) -> Iterator[None]:
    """Be the only one that writes to a folder, in order again after a process that died; see `claim`.

    Raises:
        UsageError: another process writes there, or nobody can.
    """
    check_outside_artefacts(final)
    with claim(final):
        recover(final, owned_by_trtq)
        yield


_P = ParamSpec("_P")
_R = TypeVar("_R")


def claims_output(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function be the only one that writes to its argument `out`, from its very beginning.

    Its first argument, unless it is that one, is what it reads: one must not be inside the other. Under
    `accelerate launch` this is the first process's business.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if os.environ.get("RANK", "0") != "0":
            return function(*args, **kwargs)
        first = next(iter(bound.arguments))
        source = None if first == "out" else bound.arguments[first]
        with claimed(check_place(bound.arguments["out"], source=source)):
            return function(*args, **kwargs)

    return alone


def put_in_place(partial: Path, final: Path) -> None:
    """Move a complete folder to its place; of what is there, only what is ours is removed."""
    replace_folder(partial, final, owned_by_trtq)


@contextmanager
def new_artefact(
    final: Path,
    *,
    overwrite: bool = False,
    keep_partial: bool = False,
    kind: str | None = None,
) -> Iterator[Path]:
    """Write an artefact beside its place and move it there when the block ends well.

    Args:
        final: where it will lie.
        overwrite: replace a folder of the same kind that is already there.
        keep_partial: leave the partial folder on an error, if there is a checkpoint in it, and start
            from one that is there; for stages that can be resumed.
        kind: what it is, see `check_output`.

    Yields:
        The folder to write into.

    Raises:
        UsageError: something is there already that must not be replaced, another process writes there,
            or nothing can be written.
        ArtefactError: the disk is full, or fails.
    """
    final = check_place(final)
    with claimed(final):
        check_output(final, overwrite=overwrite, kind=kind)
        partial = partial_folder(final)
        if not keep_partial or partial.is_symlink() or not partial.is_dir():
            remove_partial(final)
        try:
            partial.mkdir(exist_ok=True)
        except OSError as err:
            raise UsageError(f"cannot write to {final}: {err}") from err
        try:
            yield partial
            put_in_place(partial, final)
        except BaseException as err:
            _give_up(err, partial, final, keep_partial=keep_partial)
            raise


def _give_up(err: BaseException, partial: Path, final: Path, *, keep_partial: bool) -> None:
    """Leave nothing of what was not finished but checkpoints to go on from.

    Raises:
        ArtefactError: the disk is full, or fails.
    """
    newest = _newest_file(partial)
    kept = keep_partial and has_checkpoint(partial)
    what = "nothing of it is left"
    if kept:
        strip_partial(partial)
        what = "its checkpoints are kept; go on with --resume"
        err.add_note(RESUMABLE)
    else:
        try:
            remove_partial(final)
        except UsageError as left:
            logger.warning("%s", left)
    # A full disk, mostly; safetensors has an exception of its own for it, which names no file.
    if isinstance(err, OSError | SafetensorError):
        at = "" if newest is None or newest in str(err) else f"{newest}: "
        raise ArtefactError(f"writing {final} failed, {what}: {at}{err}") from err


def _newest_file(folder: Path) -> str | None:
    """The file that was written last, and so is the one that failed."""
    try:
        return max(files_below(folder), key=lambda name: (folder / name).lstat().st_mtime_ns)
    except (OSError, ValueError):
        return None
