"""Rows of a benchmark: artefacts, their providers, and the float checkpoint of the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtq.artefact.contents import changed_source_file
from trtq.artefact.manifest import MANIFEST_NAME, Manifest
from trtq.artefact.manifest_file import find_origin
from trtq.artefact.opened import (
    Checkpoint,
    EngineFolder,
    OnnxFolder,
    Opened,
    Run,
    StoredArtefact,
    open_artefact,
    open_folder,
)
from trtq.bench.row_texts import check_known, split_row
from trtq.checkpoint.components import DENOISERS
from trtq.checkpoint.resolve import resolve_model
from trtq.documents import read_object, shown
from trtq.engine.ort import PROVIDERS, check_provider
from trtq.errors import ArtefactError, UsageError
from trtq.graph.file import DATA_NAME, MODEL_FILE, model_file
from trtq.limits import MAX_BATCH, parse_whole
from trtq.pipelines.called import is_called
from trtq.pipelines.open import TORCH
from trtq.runs.weights import FILE_NAME

__all__ = ["BenchRow", "baseline", "find_checkpoint", "parse_batches", "parse_rows"]

_MAX_SIZES = 16
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_KINDS = {"checkpoint": "a float checkpoint", "run": "a run", "onnx": "an ONNX folder"}


@dataclass(frozen=True)
class BenchRow:
    """One artefact on one provider.

    Attributes:
        path: path of the artefact, as given by the user.
        provider: runtime, e.g. `cpu`.
        opened: the artefact or checkpoint.
        added: whether trtq added the row as a baseline.
        call_of: artefact whose recorded call all rows make, empty for a default call; None: trtq calls
            the denoisers itself.
    """

    path: str
    provider: str
    opened: Opened
    added: bool = False
    call_of: str | None = None

    @property
    def label(self) -> str:
        """`PATH@PROVIDER`."""
        return f"{self.path}@{self.provider}"

    @property
    def low_bit(self) -> bool:
        """Whether the model is quantised."""
        return self.opened.low_bit

    @property
    def kind(self) -> str:
        """`checkpoint`, `run`, `onnx` or `engine`."""
        return self.opened.kind

    @property
    def bits(self) -> str:
        """Bit widths, e.g. `w4a8`; the precision of a float model."""
        return self.opened.bits

    @property
    def size(self) -> str | None:
        """Image size of the artefact, `HEIGHTxWIDTH`; None for the model's default size."""
        return self.opened.smallest_size

    @property
    def denoiser_bytes(self) -> int | None:
        """Size of the denoiser files that loading reads; None if they are not in a local folder."""
        if isinstance(self.opened, StoredArtefact):
            files = _artefact_files(self.opened)
        else:
            model = resolve_model(self.path)
            files = [] if isinstance(model, str) else _checkpoint_files(model)
        sizes = [file.stat().st_size for file in files if file.is_file()]
        return sum(sizes) if sizes and len(sizes) == len(files) else None

    @property
    def build_seconds(self) -> float | None:
        """Duration of building the engines in seconds; None if unknown or not built."""
        if not isinstance(self.opened, EngineFolder):
            return None
        times = [engine.build_seconds for engine in self.opened.manifest.metrics.engines]
        known = [seconds for seconds in times if seconds is not None]
        return sum(known) if known and len(known) == len(times) else None


def _artefact_files(artefact: StoredArtefact) -> list[Path]:
    """The weight files of a run's denoisers, or their graphs and external data."""
    if isinstance(artefact, Run):
        return sorted(artefact.folder.rglob(FILE_NAME))
    recorded = artefact.manifest.recorded is not None
    parts = artefact.manifest.denoisers if recorded else []
    names = [row.folder for part in parts for row in part.recorded.graphs] or [artefact.denoiser]
    files: list[Path] = []
    for name in names:
        graph = model_file(artefact.folder / name)
        files.append(graph)
        if graph.name == MODEL_FILE:
            files += graph.parent.glob(f"{DATA_NAME}*")
    return files


def _checkpoint_files(folder: Path) -> list[Path]:
    """The denoisers' weight files in a checkpoint, as diffusers selects them.

    Variants (`.fp16`, `.non_ema`) and pickle files are not loaded; the index names the shards.
    """
    files: list[Path] = []
    for name in DENOISERS:
        whole, index = folder / name / _WEIGHTS, folder / name / f"{_WEIGHTS}.index.json"
        if index.is_file():
            try:
                shards = {*read_object(index)["weight_map"].values()}
                files += [folder / name / shard for shard in shards]
            except (ArtefactError, KeyError, TypeError, AttributeError):
                return []
        elif whole.is_file():
            files.append(whole)
    return files


def parse_batches(text: str) -> tuple[int, ...]:
    """Parse batch sizes: `1,4` -> (1, 4).

    Raises:
        UsageError: the text is not a list of distinct batch sizes.
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
        path, named = split_row(text)
        opened = _open(path)
        rows += [
            BenchRow(path, provider, opened)
            for provider in _providers_for(path, opened, named, providers)
        ]
    labels = [row.label for row in rows]
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise UsageError(f"{min(repeated)} is given twice; give each row once")
    return _with_call(rows)


def _check_provider(provider: str) -> None:
    if provider == TORCH:
        return
    check_known(provider)
    check_provider(provider)


def _open(path: str) -> Opened:
    """Open an artefact; for a checkpoint, check only that it exists."""
    opened = open_artefact(path)
    if isinstance(opened, Checkpoint):
        resolve_model(path)
    return opened


def _with_call(rows: list[BenchRow]) -> list[BenchRow]:
    """The rows with the call that all of them make, if one is used through its pipeline's own call.

    Raises:
        UsageError: another row was not recorded inside the pipeline's call.
    """
    called = [row for row in rows if is_called(row.opened)]
    if not called:
        return rows
    stored = [row for row in rows if isinstance(row.opened, StoredArtefact)]
    for row in stored:
        if not is_called(row.opened):
            raise UsageError(
                f"{called[0].path} is used through its pipeline's own call, and {row.path} was not "
                "recorded inside it; bench them separately"
            )
    call_of = stored[0].path if stored else ""
    return [replace(row, call_of=call_of) for row in rows]


def _providers_for(path: str, opened: Opened, named: str, offered: Sequence[str]) -> list[str]:
    """Providers of a path: the provider after its `@`, else the offered providers that support it."""
    if isinstance(opened, EngineFolder):
        return [opened.backend]
    supported = [*PROVIDERS] if isinstance(opened, OnnxFolder) else [TORCH]
    if named:
        _check_provider(named)
        if named not in supported:
            raise UsageError(
                f"{path} is {_KINDS[opened.kind]}, which {named} does not support; choose one of "
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

    Args:
        folder: folder of the artefact.
        manifest: manifest of the artefact.
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
        # Do not download a hub id for a comparison.
        if isinstance(model, Path) and _unchanged(model, recorded):
            return named
    return None


def _unchanged(folder: Path, recorded: dict[str, str]) -> bool:
    return bool(recorded) and changed_source_file(folder, recorded, all_there=True) is None


def baseline(rows: list[BenchRow], notes: list[str]) -> list[BenchRow]:
    """Create a row for the float checkpoint of the first low-bit row, unless there is a float row.

    Args:
        rows: rows that the caller requested.
        notes: list of notes; a sentence about the baseline is appended to it.
    """
    low_bit = [row for row in rows if row.low_bit]
    if not low_bit or len(low_bit) < len(rows):
        return []
    for row in low_bit:
        model = _checkpoint_of(row)
        if model is not None:
            notes.append(
                f"added the float model {model}, which {row.path} was made from, in torch; to compare "
                f"on the same runtime, export it: trtq export {model} -o FLOAT, and add FLOAT"
            )
            call_of = low_bit[0].call_of
            return [BenchRow(model, TORCH, Checkpoint(model), added=True, call_of=call_of)]
    first = low_bit[0].opened
    assert isinstance(first, StoredArtefact)
    notes.append(
        f"the float model of {low_bit[0].path} was not found (it was made from "
        f"{first.manifest.source.name!r}); give it as another PATH"
    )
    return []


def _checkpoint_of(row: BenchRow) -> str | None:
    assert isinstance(row.opened, StoredArtefact)
    return find_checkpoint(Path(row.path), row.opened.manifest)
