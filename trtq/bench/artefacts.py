"""What `trtq bench` measures: artefacts, what runs each, and the float model they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtq.artefact.contents import changed_source_file
from trtq.artefact.manifest import MANIFEST_NAME, Manifest
from trtq.artefact.manifest_file import find_origin
from trtq.artefact.opened import StoredArtefact, open_artefact, open_folder
from trtq.artefact.options import EngineOptions
from trtq.diffusion.pipeline import DENOISERS, resolve_model
from trtq.documents import read_object, shown
from trtq.engine.ort import PROVIDERS, check_provider
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import DATA_NAME, MODEL_FILE, model_file
from trtq.limits import MAX_BATCH, parse_whole
from trtq.pipelines.open import TORCH
from trtq.runs.weights import FILE_NAME

__all__ = ["Target", "baseline", "find_checkpoint", "parse_batches", "parse_targets"]

_MAX_SIZES = 16
RESERVED = ("kernels",)
"""Words of the command line that are no paths."""
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KINDS = {"checkpoint": "a float checkpoint", "run": "a run", "onnx": "an ONNX folder"}


@dataclass(frozen=True)
class Target:
    """What one row measures.

    Attributes:
        path: as the user gave it.
        provider: what runs it.
        manifest: of an artefact; None for a float checkpoint.
        added: it was not asked for, and stands here for comparison.
    """

    path: str
    provider: str
    manifest: Manifest | None = None
    added: bool = False

    @property
    def label(self) -> str:
        """`PATH@PROVIDER`."""
        return f"{self.path}@{self.provider}"

    @property
    def low_bit(self) -> bool:
        """Whether it was quantised."""
        return self.manifest is not None and self.manifest.recipe is not None

    @property
    def kind(self) -> str:
        """`checkpoint`, `run`, `onnx` or `engine`."""
        return "checkpoint" if self.manifest is None else self.manifest.kind

    @property
    def bits(self) -> str:
        """E.g. `w4a8`; of a float model its precision."""
        if self.manifest is None:
            return "fp32"
        recipe = self.manifest.recipe
        return self.manifest.options.precision if recipe is None else str(recipe.bits)

    @property
    def size(self) -> str | None:
        """Image size that it was made for, `HEIGHTxWIDTH`; None: the model's own."""
        if self.manifest is None:
            return None
        recipe = self.manifest.recipe
        size = self.manifest.options.size or (None if recipe is None else recipe.size)
        return None if size is None else size.partition(":")[0]

    @property
    def denoiser_bytes(self) -> int | None:
        """Size of the denoiser's files that are loaded; None where they are not found in a folder."""
        place = resolve_model(self.path) if self.manifest is None else Path(self.path)
        if isinstance(place, str):
            return None
        if self.manifest is None:
            files = _checkpoint_files(place)
        elif self.kind == "run":
            files = [place / FILE_NAME]
        else:
            folder = place / self.manifest.denoiser
            graph = model_file(folder)
            files = [graph]
            if graph.name == MODEL_FILE:
                files += folder.glob(f"{DATA_NAME}*")
        sizes = [file.stat().st_size for file in files if file.is_file()]
        return sum(sizes) if sizes and len(sizes) == len(files) else None

    @property
    def build_seconds(self) -> float | None:
        """Time that building took; None where nothing was built."""
        if self.manifest is None or self.kind != "engine":
            return None
        times = [engine.build_seconds for engine in self.manifest.metrics.engines]
        known = [seconds for seconds in times if seconds is not None]
        return sum(known) if known and len(known) == len(times) else None


def _checkpoint_files(folder: Path) -> list[Path]:
    """The denoiser's weights in a checkpoint, as diffusers chooses them: not the copies in other forms.

    Variants (`.fp16`, `.non_ema`) and pickles are not loaded; shards are those that the index names.
    """
    for name in DENOISERS:
        whole, index = folder / name / _WEIGHTS, folder / name / f"{_WEIGHTS}.index.json"
        if index.is_file():
            try:
                shards = {*read_object(index)["weight_map"].values()}
                return [folder / name / shard for shard in shards]
            except (ArtefactError, KeyError, TypeError, AttributeError):
                return []
        if whole.is_file():
            return [whole]
    return []


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,4` -> (1, 4).

    Raises:
        UsageError: not of that form.
    """
    try:
        sizes = tuple(parse_whole(part) for part in text.split(",", _MAX_SIZES))
    except ValueError:
        sizes = ()
    if not sizes or not 1 <= min(sizes) <= max(sizes) <= MAX_BATCH or len(set(sizes)) < len(sizes):
        raise UsageError(
            f"--batch {shown(text)} is not understood; write e.g. 1 or 1,4: different numbers from 1 to "
            f"{MAX_BATCH}, at most {_MAX_SIZES}"
        )
    return sizes


def parse_targets(paths: Sequence[str], providers: Sequence[str] = ()) -> list[Target]:
    """`PATH` and `PATH@PROVIDER` -> rows, in that order.

    Args:
        paths: artefacts, checkpoints, or one of them and a provider after the last `@`.
        providers: for paths that name none; each is run on those that can run it.

    Raises:
        UsageError: a provider is unknown, not installed, or cannot run what it is to run.
        ArtefactError: there is no such artefact, or it is damaged.
    """
    targets: list[Target] = []
    for provider in providers:
        _check_provider(provider)
    for text in paths:
        if text in RESERVED:
            raise UsageError(f"{text!r} is no path here; write ./{text} for a folder of that name")
        path, at, named = text.rpartition("@")
        if not at or not path or Path(text).exists():
            path, named = text, ""
        manifest = _manifest_of(path)
        targets += [
            Target(path, provider, manifest)
            for provider in _providers_for(path, manifest, named, providers)
        ]
    doubled = {one.label for one in targets if [o.label for o in targets].count(one.label) > 1}
    if doubled:
        raise UsageError(f"{min(doubled)} is given twice; every row is measured once")
    return targets


def _check_provider(provider: str) -> None:
    if provider == TORCH:
        return
    if provider not in PROVIDERS:
        known = ", ".join((TORCH, *PROVIDERS))
        raise UsageError(f"unknown provider {provider!r}; choose one of {known}")
    check_provider(provider)


def _manifest_of(path: str) -> Manifest | None:
    opened = open_artefact(path)
    if isinstance(opened, StoredArtefact):
        return opened.manifest
    resolve_model(path)
    return None


def _providers_for(
    path: str, manifest: Manifest | None, named: str, offered: Sequence[str]
) -> list[str]:
    """What is to run an artefact: what stands after its `@`, or those on offer that can."""
    kind = "checkpoint" if manifest is None else manifest.kind
    if manifest is not None and isinstance(manifest.options, EngineOptions):
        return [str(manifest.options.backend)]
    can = [*PROVIDERS] if kind == "onnx" else [TORCH]
    if named:
        _check_provider(named)
        if named not in can:
            raise UsageError(
                f"{path} is {_KINDS[kind]}, which {named} cannot run; choose one of {', '.join(can)}"
            )
        return [named]
    fitting = [provider for provider in dict.fromkeys(offered) if provider in can]
    if fitting:
        return fitting
    _check_provider(can[0])
    return [can[0]]


def find_checkpoint(folder: Path, manifest: Manifest) -> str | None:
    """The float checkpoint that an artefact was made from, unchanged; None if it is not to be found.

    An artefact that was made from another one is followed to it, when it lies beside.
    """
    recorded = manifest.source.files
    name = manifest.source.name
    if MANIFEST_NAME in recorded:
        place = find_origin(folder, manifest)
        return None if place is None else find_checkpoint(place, open_folder(place).manifest)
    for named in (name, str(folder.resolve().parent / name)):
        try:
            found = resolve_model(named)
        except ArtefactError:
            continue
        # A hub id stays one only while it is no folder; it is not downloaded for a comparison.
        if isinstance(found, Path) and _unchanged(found, recorded):
            return named
    return None


def _unchanged(folder: Path, recorded: dict[str, str]) -> bool:
    return bool(recorded) and changed_source_file(folder, recorded, all_there=True) is None


def baseline(targets: list[Target], notes: list[str]) -> list[Target]:
    """The checkpoint of a low-bit artefact, where no float row was asked for.

    Args:
        targets: what was asked for.
        notes: gets a sentence about what was added, or why nothing was.
    """
    low_bit = [target for target in targets if target.low_bit]
    if not low_bit or len(low_bit) < len(targets):
        return []
    for target in low_bit:
        assert target.manifest is not None
        found = find_checkpoint(Path(target.path), target.manifest)
        if found is not None:
            notes.append(
                f"added the float model {found}, which {target.path} was made from, in torch; for the "
                f"same runtime on both sides, export it: trtq export {found} -o FLOAT, and give FLOAT"
            )
            return [Target(found, TORCH, added=True)]
    first = low_bit[0]
    assert first.manifest is not None
    notes.append(
        f"the float model of {first.path} was not found (it was made from "
        f"{first.manifest.source.name!r}); give it as one more PATH"
    )
    return []
