"""Rows of a benchmark: artefacts, their providers, and the float checkpoint they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtq.artefact.contents import changed_source_file
from trtq.artefact.manifest import (
    MANIFEST_NAME,
    Manifest,
    find_origin,
)
from trtq.artefact.opened import StoredArtefact, open_artefact, open_folder
from trtq.diffusion.pipeline import DENOISERS, resolve_model
from trtq.documents import read_object, shown
from trtq.engine.ort import PROVIDERS, check_provider
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import DATA_NAME, MODEL_FILE, model_file
from trtq.limits import MAX_BATCH, parse_whole
from trtq.pipelines.open import TORCH
from trtq.runs.weights import FILE_NAME

__all__ = ["BenchRow", "baseline", "find_checkpoint", "parse_batches", "parse_rows"]

_MAX_SIZES = 16
RESERVED = ("kernels",)
"""Subcommands of `trtq bench`, which are not paths."""
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KINDS = {"checkpoint": "a float checkpoint", "run": "a run", "onnx": "an ONNX folder"}


@dataclass(frozen=True)
class BenchRow:
    """One artefact on one provider.

    Attributes:
        path: path, as given by the user.
        provider: runtime, e.g. `cpu`.
        manifest: manifest of the artefact; None for a float checkpoint.
        added: whether trtq added the row as a baseline.
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
        """Whether the model is quantised."""
        return self.manifest is not None and self.manifest.recipe is not None

    @property
    def kind(self) -> str:
        """`checkpoint`, `run`, `onnx` or `engine`."""
        return "checkpoint" if self.manifest is None else self.manifest.kind

    @property
    def bits(self) -> str:
        """Bit widths, e.g. `w4a8`; the precision of a float model."""
        if self.manifest is None:
            return "fp32"
        recipe = self.manifest.recipe
        return str(recipe["bits"] if recipe else self.manifest.options.get("precision", "fp32"))

    @property
    def size(self) -> str | None:
        """Image size of the artefact, `HEIGHTxWIDTH`; None for the model's default size."""
        if self.manifest is None:
            return None
        size = self.manifest.options.get("size") or (self.manifest.recipe or {}).get("size")
        return None if size is None else str(size).partition(":")[0]

    @property
    def denoiser_bytes(self) -> int | None:
        """Size of the denoiser files that loading reads; None if they are not in a local folder."""
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
        """Duration of building the engines in seconds; None if unknown or not built."""
        if self.manifest is None or self.kind != "engine":
            return None
        rows = self.manifest.metrics.get("engines") or []
        times = [row.get("build_seconds") for row in rows]
        # A missing duration means unknown, not zero.
        return float(sum(times)) if times and None not in times else None


def _checkpoint_files(folder: Path) -> list[Path]:
    """The denoiser's weight files in a checkpoint, as diffusers selects them.

    Variants (`.fp16`, `.non_ema`) and pickle files are not loaded; the index names the shards.
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
    """Parse batch sizes: `1,4` -> (1, 4).

    Raises:
        UsageError: the text is not a list of different batch sizes.
    """
    try:
        sizes = tuple(parse_whole(part) for part in text.split(",", _MAX_SIZES))
    except ValueError:
        sizes = ()
    if not sizes or not 1 <= min(sizes) <= max(sizes) <= MAX_BATCH or len(set(sizes)) < len(sizes):
        raise UsageError(
            f"invalid --batch-sizes {shown(text)}; write e.g. 1 or 1,4: up to {_MAX_SIZES} different "
            f"numbers from 1 to {MAX_BATCH}"
        )
    return sizes


def parse_rows(paths: Sequence[str], providers: Sequence[str] = ()) -> list[BenchRow]:
    """Parse `PATH` and `PATH@PROVIDER` into rows, in the given order.

    Args:
        paths: artefacts and checkpoints, with an optional provider after the last `@`.
        providers: providers for paths without `@`; a path gets one row per provider that supports it.

    Raises:
        UsageError: a provider is unknown, not installed, or does not support the artefact.
        ArtefactError: an artefact does not exist or is damaged.
    """
    rows: list[BenchRow] = []
    for provider in providers:
        _check_provider(provider)
    for text in paths:
        if text in RESERVED:
            raise UsageError(f"{text!r} is a subcommand; write ./{text} for a folder of that name")
        path, at, named = text.rpartition("@")
        if not at or not path or Path(text).exists():
            path, named = text, ""
        manifest = _manifest_of(path)
        rows += [
            BenchRow(path, provider, manifest)
            for provider in _providers_for(path, manifest, named, providers)
        ]
    labels = [row.label for row in rows]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise UsageError(f"{min(repeated)} is given twice; give each row once")
    return rows


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
    """Providers of a path: the provider after its `@`, else the offered providers that support it."""
    kind = "checkpoint" if manifest is None else manifest.kind
    if manifest is not None and kind == "engine":
        return [str(manifest.options["backend"])]
    supported = [*PROVIDERS] if kind == "onnx" else [TORCH]
    if named:
        _check_provider(named)
        if named not in supported:
            raise UsageError(
                f"{path} is {_KINDS[kind]}, which {named} does not support; choose one of "
                f"{', '.join(supported)}"
            )
        return [named]
    fitting = [provider for provider in dict.fromkeys(offered) if provider in supported]
    if fitting:
        return fitting
    _check_provider(supported[0])
    return [supported[0]]


def find_checkpoint(folder: Path, manifest: Manifest) -> str | None:
    """Find the unchanged float checkpoint that an artefact was made from; None if there is none.

    If the artefact was made from another artefact in a sibling folder, that artefact is searched, too.
    """
    recorded = manifest.source.files
    name = manifest.source.name
    if MANIFEST_NAME in recorded:
        place = find_origin(folder, manifest)
        return None if place is None else find_checkpoint(place, open_folder(place).manifest)
    for named in (name, str(folder.resolve().parent / name)):
        try:
            model = resolve_model(named)
        except ArtefactError:
            continue
        # Hub ids are not downloaded for a comparison.
        if isinstance(model, Path) and _unchanged(model, recorded):
            return named
    return None


def _unchanged(folder: Path, recorded: dict[str, str]) -> bool:
    return bool(recorded) and changed_source_file(folder, recorded, all_there=True) is None


def baseline(rows: list[BenchRow], notes: list[str]) -> list[BenchRow]:
    """A row for the float checkpoint of the first low-bit row, unless there is a float row.

    Args:
        rows: rows that the caller asked for.
        notes: list to which a sentence about the baseline is appended.
    """
    low_bit = [row for row in rows if row.low_bit]
    if not low_bit or len(low_bit) < len(rows):
        return []
    for row in low_bit:
        assert row.manifest is not None
        model = find_checkpoint(Path(row.path), row.manifest)
        if model is not None:
            notes.append(
                f"added the float model {model}, which {row.path} was made from, in torch; to compare "
                f"on the same runtime, export it: trtq export {model} -o FLOAT, and add FLOAT"
            )
            return [BenchRow(model, TORCH, added=True)]
    first = low_bit[0]
    assert first.manifest is not None
    notes.append(
        f"the float model of {first.path} was not found (it was made from "
        f"{first.manifest.source.name!r}); give it as another PATH"
    )
    return []
